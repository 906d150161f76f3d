"""FP8 and MXFP4 against float64 NumPy, bit by bit decoded; slices as the whole; bad groups refused."""

import jax.numpy as jnp
import numpy as np
import published
import pytest
from safetensors.numpy import save_file

from moejax.interop import quantized
from moejax.interop.files import InteropError
from moejax.interop.load import load_model
from moejax.interop.safetensors_file import NewTensor, read_header, write_file

F8, E8M0 = np.dtype(jnp.float8_e4m3fn), np.dtype(jnp.float8_e8m0fnu)


def e4m3(byte):
    """OCP FP8 E4M3: 1 sign, 4 exponent (bias 7), 3 mantissa bits; no infinity, S.1111.111 is NaN."""
    sign, exponent, mantissa = -1.0 if byte & 0x80 else 1.0, (byte >> 3) & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return np.nan
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def e2m1(nibble):
    """OCP MX E2M1: 1 sign, 2 exponent (bias 1), 1 mantissa bit."""
    sign, exponent, mantissa = -1.0 if nibble & 8 else 1.0, (nibble >> 1) & 3, nibble & 1
    return sign * (mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1))


def open_group(folder, tensors, block=(128, 128)):
    save_file(tensors, folder / "x.safetensors")
    return quantized.unpack(read_header(folder / "x.safetensors"), block)


def test_fp8(tmp_path):
    """Every byte; blocks cut off at both borders; the scale is multiplied, despite its name."""
    rng = np.random.default_rng(0)
    rows, cols = 300, 200
    data = rng.integers(0, 256, (rows, cols)).astype(np.uint8)
    data[data & 0x7F == 0x7F] = 1  # NaN
    data[0, :127] = np.arange(127)
    scale = rng.uniform(1e-4, 3, (3, 2)).astype(np.float32)
    group = {"a.weight": data.view(F8), "a.weight_scale_inv": scale, "b": scale}
    out = open_group(tmp_path, group)
    assert set(out) == {"a.weight", "b"}
    table = np.array([e4m3(b) for b in range(256)])
    want = (
        table[data] * np.repeat(np.repeat(scale.astype(np.float64), 128, 0), 128, 1)[:rows, :cols]
    )
    got = out["a.weight"].read()
    assert got.dtype == published.BF16 and got.shape == out["a.weight"].shape == (rows, cols)
    # One rounding to float32 (2^-24) and one to bfloat16's 8 bits (2^-8).
    np.testing.assert_allclose(got.astype(np.float64), want, rtol=2**-8 * 1.001, atol=0)
    index = (slice(120, 259), slice(3, 199, 4))
    np.testing.assert_array_equal(out["a.weight"].read(index), got[index])


def test_fp8_block_size_of_the_config(tmp_path):
    data = np.arange(1, 13, dtype=np.uint8).reshape(3, 4).view(F8)
    group = {"a": data, "a_scale_inv": np.array([[1, 2], [3, 4]], np.float32)}
    got = open_group(tmp_path, group, block=(2, 2))["a"].read()
    scale = np.repeat(np.repeat(group["a_scale_inv"], 2, 0), 2, 1)[:3]
    np.testing.assert_array_equal(got.astype(np.float32), data.astype(np.float32) * scale)


def test_mxfp4(tmp_path):
    """All sixteen values and exponents over bfloat16's range are exact; low nibble first; [.., out, in]
    is read as [.., in, out]; any slice is the slice of the whole."""
    rng = np.random.default_rng(1)
    experts, out_width, groups = 2, 6, 3
    blocks = rng.integers(0, 256, (experts, out_width, groups, 16)).astype(np.uint8)
    scales = rng.integers(10, 250, (experts, out_width, groups)).astype(np.uint8)
    tensor = open_group(tmp_path, {"w_blocks": blocks, "w_scales": scales})["w"]
    assert tensor.shape == (experts, 32 * groups, out_width)
    want = np.empty(tensor.shape, np.float64)
    for e, o, i in np.ndindex(experts, out_width, 32 * groups):
        byte = int(blocks[e, o, i // 32, i % 32 // 2])
        nibble = byte >> 4 if i % 2 else byte & 15
        want[e, i, o] = e2m1(nibble) * 2.0 ** (int(scales[e, o, i // 32]) - 127)
    got = tensor.read()
    assert got.dtype == published.BF16
    np.testing.assert_array_equal(got.astype(np.float64), want)
    for index in (
        (slice(1, 2), slice(0, 96), slice(0, 6)),
        (slice(0, 2), slice(5, 71), slice(1, 6, 2)),
        (slice(0, 1), slice(32, 64), slice(2, 3)),
    ):
        np.testing.assert_array_equal(tensor.read(index), got[index])


def write_group(folder, tensors):
    """`save_file` for what the library does not write: E8M0."""
    new = [NewTensor(n, a.dtype, a.shape, lambda a=a: a) for n, a in tensors.items()]
    with (folder / "x.safetensors").open("wb") as f:
        write_file(f, new, lambda _: None)
    return quantized.unpack(read_header(folder / "x.safetensors"), (2, 4))


def test_powers_of_two_as_scales(tmp_path):
    """V4's names: FP8 with E8M0 per block, FP4 with E8M0 per 32 values of the input; a `.scale` beside nothing
    stays what it is."""
    rng = np.random.default_rng(4)
    exponents = rng.integers(110, 140, (2, 2)).astype(np.uint8)
    eight = rng.integers(0, 126, (3, 6)).astype(np.uint8)
    four = rng.integers(0, 256, (5, 48)).astype(np.uint8)
    scales = rng.integers(2, 250, (5, 3)).astype(np.uint8)
    tensors = {
        "a.weight": eight.view(F8),
        "a.scale": exponents.view(E8M0),
        "b.weight": four.view(np.int8),
        "b.scale": scales.view(E8M0),
        "attn_hc.scale": np.ones(3, np.float32),
    }
    out = write_group(tmp_path, tensors)
    assert set(out) == {"a.weight", "b.weight", "attn_hc.scale"}
    want = np.array([[e4m3(int(b)) for b in row] for row in eight])
    want *= 2.0 ** (np.repeat(np.repeat(exponents, 2, 0), 4, 1)[:3, :6].astype(int) - 127)
    np.testing.assert_array_equal(out["a.weight"].read().astype(np.float64), want)
    want = np.empty((5, 96))
    for o, i in np.ndindex(5, 96):
        byte = int(four[o, i // 2])
        want[o, i] = e2m1(byte >> 4 if i % 2 else byte & 15) * 2.0 ** (
            int(scales[o, i // 32]) - 127
        )
    tensor = out["b.weight"]
    got = tensor.read()
    assert tensor.shape == (5, 96) and got.dtype == tensor.dtype == published.BF16
    np.testing.assert_array_equal(got.astype(np.float64), want)
    for index in ((slice(1, 4), slice(5, 71)), (slice(0, 5, 2), slice(32, 64, 3))):
        np.testing.assert_array_equal(tensor.read(index), got[index])


@pytest.mark.parametrize(
    "tensors, text",
    [
        (
            {"a.weight": np.ones((2, 16), np.int8), "a.scale": np.ones((2, 1), np.float32)},
            "F8_E8M0",
        ),
        ({"a.weight": np.ones((2, 16), np.int8), "a.scale": np.ones((1, 1), E8M0)}, r"\[2, 1\]"),
        ({"a.weight": np.ones((2, 15), np.int8), "a.scale": np.ones((2, 1), E8M0)}, "groups of 32"),
        ({"a.weight": np.ones(16, np.int8), "a.scale": np.ones((1, 1), E8M0)}, "groups of 32"),
        ({"a.weight": np.ones((2, 4), np.float32), "a.scale": np.ones((1, 1), E8M0)}, "F8_E4M3"),
        ({"a.weight": np.ones((2, 4), F8), "a.scale": np.ones((2, 1), E8M0)}, r"\[1, 1\]"),
        ({"a.weight": np.ones((2, 4), F8), "a.scale": np.ones((1, 1), np.uint8)}, "F32 or F8_E8M0"),
    ],
)
def test_bad_groups_of_v4(tmp_path, tensors, text):
    with pytest.raises(InteropError, match=text):
        write_group(tmp_path, tensors)


def test_a_scale_that_is_no_number(tmp_path):
    """E8M0 has a NaN: it reaches the values, also where they are 0, and so the check of whoever loads them."""
    scales = np.full((1, 1), 255, np.uint8).view(E8M0)
    for weight in (np.zeros((1, 16), np.int8), np.zeros((1, 4), F8)):
        (tmp_path / str(weight.dtype)).mkdir()
        out = write_group(tmp_path / str(weight.dtype), {"a.weight": weight, "a.scale": scales})
        assert np.isnan(out["a.weight"].read().astype(np.float32)).all()


def test_v3_in_fp8(tmp_path):
    """A whole checkpoint: matrices in FP8 with small blocks, the rest as published; loads in bfloat16
    as the dequantised checkpoint does."""
    config = published.config("deepseek_v3")
    plain, packed = published.random_tensors(config), {}
    rng = np.random.default_rng(2)
    kept = ("embed", "norm", "head", "mlp.gate.", "eh_proj")
    for name, tensor in plain.items():
        packed[name] = tensor
        if tensor.ndim == 2 and not any(k in name for k in kept):
            rows, cols = tensor.shape
            scale = rng.uniform(0.5, 2, (-(-rows // 4), -(-cols // 8))).astype(np.float32)
            packed[name] = tensor.astype(F8)
            packed[name + "_scale_inv"] = scale
            spread = np.repeat(np.repeat(scale, 4, 0), 8, 1)[:rows, :cols]
            plain[name] = (packed[name].astype(np.float32) * spread).astype(published.BF16)
    quantization = {"quant_method": "fp8", "weight_block_size": [4, 8]}
    published.write(tmp_path / "fp8", config | {"quantization_config": quantization}, packed)
    published.write(tmp_path / "bf16", config, plain)
    _, a, _ = load_model(tmp_path / "fp8")
    _, b, _ = load_model(tmp_path / "bf16")
    np.testing.assert_array_equal(a["head"], b["head"])
    experts = (
        a["moe_blocks"]["moe"]["experts"]["w_down"],
        b["moe_blocks"]["moe"]["experts"]["w_down"],
    )
    np.testing.assert_array_equal(*experts)
    np.testing.assert_array_equal(
        a["mtp"]["block"]["attn"]["w_o"], b["mtp"]["block"]["attn"]["w_o"]
    )
    assert experts[0].dtype == published.BF16


def test_gpt_oss_in_mxfp4(tmp_path):
    """Fused and interleaved experts, packed: gate and up come out of the right columns."""
    config = published.config("gpt_oss") | {"hidden_size": 32, "intermediate_size": 64}
    tensors = published.random_tensors(config)
    rng = np.random.default_rng(3)
    packed = {n: t for n, t in tensors.items() if not n.endswith(("gate_up_proj", "down_proj"))}
    for i in range(config["num_hidden_layers"]):
        for name, out, groups in (("gate_up_proj", 128, 1), ("down_proj", 32, 2)):
            full = f"model.layers.{i}.mlp.experts.{name}"
            packed[full + "_blocks"] = rng.integers(0, 256, (3, out, groups, 16)).astype(np.uint8)
            packed[full + "_scales"] = rng.integers(120, 130, (3, out, groups)).astype(np.uint8)
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    published.write(tmp_path, config | {"quantization_config": quantization}, packed)
    _, params, _ = load_model(tmp_path)
    experts = params["moe_blocks"]["moe"]["experts"]
    table = np.array([e2m1(n) for n in range(16)])
    blocks = packed["model.layers.2.mlp.experts.gate_up_proj_blocks"][1]
    scales = packed["model.layers.2.mlp.experts.gate_up_proj_scales"][1].astype(np.float64)
    values = np.stack([table[blocks & 15], table[blocks >> 4]], -1).reshape(128, 32)
    values *= 2.0 ** (scales - 127)
    np.testing.assert_array_equal(np.asarray(experts["w_gate"])[2, 1], values[0::2].T)
    np.testing.assert_array_equal(np.asarray(experts["w_up"])[2, 1], values[1::2].T)
    assert experts["w_down"].shape == (3, 3, 64, 32)


@pytest.mark.parametrize(
    "group, text",
    [
        ({"a": np.ones((4, 4), F8), "a_scale_inv": np.ones((2, 1), np.float32)}, r"shape \[1, 1\]"),
        ({"a": np.ones((4, 4), F8), "a_scale_inv": np.ones((1, 1), np.float16)}, "must be F32"),
        ({"a": np.ones((4, 4), np.float32), "a_scale_inv": np.ones((1, 1), np.float32)}, "F8_E4M3"),
        ({"a_blocks": np.ones((2, 3, 8), np.uint8), "a_scales": np.ones((2, 3), np.uint8)}, "16"),
        (
            {"a_blocks": np.ones((2, 3, 16), np.uint8), "a_scales": np.ones((2, 2), np.uint8)},
            "2, 3",
        ),
    ],
)
def test_bad_groups(tmp_path, group, text):
    with pytest.raises(InteropError, match=text):
        open_group(tmp_path, group)


def test_fp8_without_scales(tmp_path):
    """Unscaled FP8 weights would load as nonsense."""
    config = published.config("llama")
    tensors = published.random_tensors(config)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(F8)
    published.write(tmp_path, config, tensors)
    with pytest.raises(InteropError, match=r"lm_head\.weight has dtype float8_e4m3fn"):
        load_model(tmp_path)
