"""A step with weights on the experts' inputs, and with weighed shared experts, on a mesh as on one device."""

import pytest
from mesh_case import assert_same, oracle, run

# The router, and how the step is computed.
CASES = {
    "inputs": (
        dict(weigh_inputs=True),
        dict(mesh=dict(fsdp=2, expert=2), expert_parallel="all_to_all", accumulation=2),
    ),
    "shared": (
        dict(normalize_with_shared=True, normalize_weights=False, shared_experts=2),
        dict(mesh=dict(expert=2, tensor=2)),
    ),
}


@pytest.mark.product
@pytest.mark.parametrize("case", CASES)
def test_step(case):
    router, how = CASES[case]
    assert_same(run(**how, **router), oracle(**router))
