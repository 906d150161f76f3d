"""Memory, roofline and hardware of a plan."""

import dataclasses

import pytest

from moejax.config import (
    AttentionConfig,
    ConfigError,
    DataConfig,
    ExperimentConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    TrainConfig,
)
from moejax.cost import hardware, memory, models, roofline
from moejax.cost.architecture import of_model
from moejax.cost.flops import flops_per_token
from moejax.cost.plan import plan
from moejax.cost.published import published
from moejax.cost.setup import Setup, check_setup, of_experiment
from moejax.mesh import MeshSizes, parse_mesh
from moejax.models import zoo
from moejax.text import (
    Table,
    bytes_text,
    count_text,
    flops_text,
    render,
    seconds_text,
)
from tests.flat import change

H100 = hardware.load_device("h100")
MOE = ExperimentConfig(
    model=ModelConfig(
        vocab_size=256,
        d_model=64,
        num_layers=3,
        num_dense_layers=1,
        d_ff=128,
        attention=AttentionConfig(num_heads=4, num_kv_heads=4, head_dim=16),
        moe=MoEConfig(num_experts=8, experts_per_token=2, d_expert=32),
    )
)
LLAMA = ExperimentConfig(model=zoo.load_preset("llama-2-7b"))  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Hardware and money.


def test_v3_cost():
    """2412.19437 Table 1: 2664K + 119K + 5K H800 hours at $2 are $5.576M; 180K hours per
    trillion."""
    hours = 2_664_000 + 119_000 + 5_000
    price = hardware.load_device("h800").price
    assert roofline.money(hours, price) == 5_576_000
    assert published()["deepseek-v3"]["gpu_hours"] == hours
    assert published()["deepseek-v3"]["cost"] == 5_576_000
    # 2048 devices; a trillion tokens in 180K device hours, 3.7 days.
    rate = 1e12 / (180_000 / 2048 * 3600)
    assert f"{1e12 / rate / 86_400:.1f}" == "3.7"
    assert roofline.gpu_hours(14.8e12, rate, 2048) == pytest.approx(2_664_000)


def test_default_efficiency_is_what_v3_reached():
    """250.4 GFLOPs a token (2505.09343 Table 2), 14.8T tokens, 2664K hours of 989 TFLOP/s."""
    flops = flops_per_token(of_model(zoo.load_preset("deepseek-v3")), "train", 4096).total or 0
    peak = hardware.load_device("h800").peak("bfloat16")
    reached = flops * 14.8e12 / (2_664_000 * 3600 * peak)
    assert f"{reached:.2f}" == "0.39" and round(reached, 1) == roofline.EFFICIENCY


def test_published_gpu_hours():
    """2405.04434 section 3.2.3: per trillion tokens 172.8K (V2) against 300.6K (67B): 42.5%
    less."""
    facts = published()
    per = {
        n: facts[n]["gpu_hours"] / facts[n]["tokens"] for n in ("deepseek-v2", "deepseek-llm-67b")
    }
    assert f"{1 - per['deepseek-v2'] / per['deepseek-llm-67b']:.3f}" == "0.425"


def test_every_published_model_but_the_undisclosed_is_in_the_zoo():
    hidden = {n for n, f in published().items() if f["total"] == "undisclosed"}
    assert hidden == {"gpt-4"}
    assert set(published()) - hidden <= set(zoo.PRESETS | zoo.COUNTED_PRESETS)


def test_devices():
    for name in hardware.names():
        d = hardware.load_device(name)
        # No accelerator does under 50 or over 1000 FLOPs per byte; a wrong unit would.
        assert 50 < d.peak("bfloat16") / d.bandwidth < 1000, name
        assert d.memory > 1e10 and d.source
    assert hardware.load_device("h100", price=3.5).price == 3.5
    with pytest.raises(ConfigError, match="did you mean h100"):
        hardware.load_device("h10")
    with pytest.raises(ConfigError, match="price=-1"):
        hardware.load_device("h100", price=-1)


def test_cpu_is_measured():
    d = hardware.load_device("cpu")
    # A busy machine may be slow; a wrong unit would be a thousand times off.
    assert 1e7 < d.flops["float32"] < 1e14 and 1e7 < d.bandwidth < 1e13 and d.memory > 1e8
    assert d.price is None


# --------------------------------------------------------------------------------------------------
# Memory and roofline.


def test_training_memory_of_one_device():
    held = memory.training(MOE, MeshSizes(), 4, 32)
    parameters = sum(p.total for p in of_model(MOE.model).parts)
    assert (held.weights, held.gradients, held.optimizer) == (4 * parameters,) * 2 + (
        8 * parameters,
    )
    assert held.cast == held.buffers == 0
    assert held.total > 16 * parameters


def test_sharding_divides_weights():
    experts = of_model(MOE.model).part("routed experts")
    assert experts is not None
    one, many = (memory.training(MOE, m, 8, 32) for m in (MeshSizes(), MeshSizes(data=2, expert=4)))
    assert one.weights - many.weights == 4 * experts.total * 3 / 4
    fsdp = memory.training(MOE, MeshSizes(fsdp=8), 8, 32)
    assert fsdp.weights == one.weights / 8
    assert fsdp.activations == pytest.approx(one.activations / 8)


def test_remat_and_accumulation_and_dtype():
    kept = {
        r: memory.training(change(MOE, remat=r), MeshSizes(), 8, 32).activations
        for r in ("none", "dots", "full")
    }
    assert kept["full"] < kept["dots"] < kept["none"]
    plain = memory.training(MOE, MeshSizes(), 8, 32)
    assert (
        memory.training(MOE, MeshSizes(), 8, 32, accumulate=True).gradients == 2 * plain.gradients
    )
    half = memory.training(change(MOE, dtype="bfloat16"), MeshSizes(), 8, 32)
    assert half.cast == plain.weights / 2 and half.weights == plain.weights


def test_expert_parallel_buffers():
    mesh = MeshSizes(expert=4)
    sizes = {}
    for way, factor in (("ring", 0.0), ("all_to_all", 0.0), ("all_to_all", 1.0)):
        cfg = change(MOE, expert_parallel=way, buffer_factor=factor)
        sizes[way, factor] = memory.training(cfg, mesh, 8, 32).buffers
    one = 8 * 32 / 4 * 64 * 4  # a device's tokens, float32
    assert sizes["ring", 0.0] == 2 * 4 * one
    assert sizes["all_to_all", 1.0] == 2 * 2 * one
    assert sizes["all_to_all", 0.0] == 4 * sizes["all_to_all", 1.0]


def test_rows_of_split_experts():
    """8 experts, 2 per token, over 4 devices: each holds 2, and 4 peers may send both routes of every
    token to it; no more than buffer_factor times 2 routes if there is one."""
    mesh = MeshSizes(expert=4)
    assert memory.rows_per_token(MOE, MeshSizes(data=4)) == 2
    assert memory.rows_per_token(MOE, mesh) == 8
    assert memory.rows_per_token(change(MOE, buffer_factor=1.5), mesh) == 3
    assert memory.rows_per_token(change(MOE, buffer_factor=100.0), mesh) == 8


def test_mesh_rules_move_the_experts():
    """'expert=data': experts split over the devices that hold the batch."""
    experts, attention = (of_model(MOE.model).part(n) for n in ("routed experts", "attention"))
    assert experts and attention
    cfg = dataclasses.replace(MOE, mesh=MeshConfig(data=4, rules=("expert=data",)))
    _, setup = of_experiment(cfg, H100, 4)
    assert (experts.shards(setup.mesh), attention.shards(setup.mesh), setup.mesh.peers) == (4, 1, 4)
    moved, plain = (memory.training(MOE, m, 8, 32) for m in (setup.mesh, MeshSizes(data=4)))
    assert plain.weights - moved.weights == 4 * experts.total * 3 / 4
    with pytest.raises(ConfigError, match="num_experts=8 does not divide over 3"):
        check_setup(MOE, Setup(H100, dataclasses.replace(setup.mesh, data=3), 3, 3))


def test_deepseek_moe_16b_fits_a_40gb_device():
    """2401.06066 abstract: the 16B model is deployed on a single GPU with 40GB."""
    a = of_model(zoo.load_preset("deepseek-moe-16b"))
    held = memory.inference(a, MeshSizes(), 1, 4096)
    total = sum(v for v in held.values() if v is not None)
    assert total < 0.9 * hardware.load_device("a100-40gb").memory
    row = models.compare(["deepseek-moe-16b"])[0]
    assert row.device == "a100-40gb"


def test_training_estimate_by_hand():
    cfg = change(MOE, dtype="bfloat16")
    e = roofline.training_step(cfg, H100, MeshSizes(), 4, 32, efficiency=0.5)
    model = flops_per_token(of_model(cfg.model), "train", 32, causal=False).total or 0
    assert e.compute == pytest.approx(128 * model / (0.5 * 989e12))
    assert e.network == 0 and e.limit == "memory" and e.seconds == e.memory
    assert e.tokens_per_second == 128 / e.seconds
    assert e.intensity == e.flops / e.bytes
    again = roofline.training_step(
        change(cfg, remat="full"), H100, MeshSizes(), 4, 32, efficiency=0.5
    )
    assert again.compute == pytest.approx(e.compute * 4 / 3)


def test_counting_loads_before_accumulation_is_a_forward_pass_more():
    def compute(loss, accumulation):
        cfg = change(MOE, expert_loss=loss)
        run = roofline.training_step(cfg, H100, MeshSizes(), 4, 32, accumulation=accumulation)
        return run.compute

    assert compute(0.0, 2) == compute(0.01, 1)
    assert compute(0.01, 2) == pytest.approx(compute(0.01, 1) * 4 / 3)


def test_large_batches_are_bound_by_arithmetic():
    cfg = change(LLAMA, dtype="bfloat16")
    assert roofline.training_step(cfg, H100, MeshSizes(), 64, 4096).limit == "compute"
    arch = of_model(cfg.model)
    small = roofline.decode_step(arch, H100, MeshSizes(), 1, 128)
    large = roofline.decode_step(arch, H100, MeshSizes(), 4096, 1)
    assert small and small.limit == "memory"
    assert large and large.limit == "compute"


def test_network_binds_without_a_batch_to_hide_it():
    cfg = change(LLAMA, dtype="bfloat16")
    assert roofline.training_step(cfg, H100, MeshSizes(fsdp=64), 64, 128).limit == "network"


def test_decoding_reads_only_the_experts_in_use():
    arch = of_model(zoo.load_preset("mixtral-8x7b"))
    one, two = (roofline.decode_step(arch, H100, MeshSizes(), b, 1) for b in (1, 1000))
    experts, embedding = arch.part("routed experts"), arch.part("embedding")
    assert one and two and experts and embedding
    rest = sum(p.total for p in arch.parts) - experts.total - embedding.total
    cache = memory.cache_bytes(arch, 1) or 0
    assert one.bytes == pytest.approx(2 * (rest + experts.total * 2 / 8) + cache)
    assert two.bytes == pytest.approx(2 * (rest + experts.total) + 1000 * cache)


def test_nearest_fit_changes_as_little_as_it_can():
    cfg = change(LLAMA, dtype="bfloat16", remat="dots")
    tight = dataclasses.replace(H100, memory=200e9)
    fit = roofline.nearest_fit(cfg, tight, MeshSizes(), 64, 4096)
    # Alone, 7B takes 16 + 4 (accumulated gradients) + 2 bytes a parameter: 148 GB, and room for
    # some.
    assert fit is not None and fit.mesh == MeshSizes() and fit.micro_batch < 64
    fit = roofline.nearest_fit(cfg, H100, MeshSizes(), 64, 4096)
    assert fit is not None and fit.mesh.devices in (2, 4) and fit.bytes < 0.9 * H100.memory
    held = memory.training(
        dataclasses.replace(cfg, compute=fit.compute),
        fit.mesh,
        fit.micro_batch,
        4096,
        accumulate=True,
    )
    assert held.total == fit.bytes
    check_setup(cfg, Setup(H100, fit.mesh, 64, fit.micro_batch))  # the mesh it names is a legal one
    assert (
        roofline.nearest_fit(cfg, dataclasses.replace(H100, memory=1e6), MeshSizes(), 64, 4096)
        is None
    )


def test_meshes_are_legal():
    for mesh in roofline.meshes(MOE.model, 8):
        check_setup(MOE, Setup(H100, mesh, batch=8, micro_batch=8, context=32))
        assert mesh.devices == 8


# --------------------------------------------------------------------------------------------------
# Plans of experiments.


def test_of_experiment():
    cfg = dataclasses.replace(
        MOE,
        data=DataConfig(batch_size=16, seq_len=32),
        train=TrainConfig(steps=10, accumulation=2),
        mesh=MeshConfig(data=-1, expert=4),
    )
    arch, setup = of_experiment(cfg, H100, 8)
    assert setup.mesh == MeshSizes(data=2, expert=4)
    assert (setup.batch, setup.micro_batch, setup.context, setup.tokens) == (
        16,
        8,
        32,
        10 * 16 * 32,
    )
    assert plan(arch, cfg, setup)
    with pytest.raises(ConfigError, match="multiple of 4"):
        of_experiment(cfg, H100, 6)


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"batch": 0}, "batch=0"),
        ({"batch": 9, "micro_batch": 2}, "multiple of micro_batch=2"),
        ({"efficiency": 1.5}, "efficiency=1.5"),
        ({"tokens": -1.0}, "tokens=-1.0"),
        ({"mesh": MeshSizes(expert=3), "batch": 3, "micro_batch": 3}, "num_experts=8"),
        ({"mesh": MeshSizes(fsdp=2)}, "micro_batch=1 does not divide"),
    ],
)
def test_impossible_setups(changes, text):
    with pytest.raises(ConfigError) as e:
        check_setup(MOE, Setup(H100, **changes))
    assert text in str(e.value)


# --------------------------------------------------------------------------------------------------
# Tables and commands.


def test_texts():
    assert [count_text(n) for n in (16.3757e9, 124.44e6, 5, None)] == [
        "16.38B", "124.4M", "5", "unknown",
    ]  # fmt: skip
    assert bytes_text(896 * 2**20) == "896 MiB" and bytes_text(1023.9 * 2**30) == "1024 GiB"
    assert flops_text(393_200) == "393.2K"
    assert [seconds_text(s) for s in (2e-6, 0.05, 3.0, 7200, 1e6)] == [
        "2 us", "50 ms", "3 s", "2 h", "11.57 days",
    ]  # fmt: skip


def test_tables_line_up():
    text = render([Table("T", ["name", "n"], [["a", "1"], ["long", "100"]], "note")])
    assert text.split("\n")[:5] == ["T", "name    n", "----  ---", "a       1", "long  100"]
    assert "| a | 1 |" in render([Table("", ["x", "n"], [["a", "1"]])], "markdown")
    assert render([Table("", ["x", "n"], [["a,b", "1"]])], "csv") == 'x,n\n"a,b",1\n'
    with pytest.raises(ValueError, match="expected one of table"):
        render([], "html")


def test_parse_mesh():
    assert parse_mesh("fsdp=8,expert=4") == MeshSizes(fsdp=8, expert=4)
    assert parse_mesh("") == MeshSizes()
