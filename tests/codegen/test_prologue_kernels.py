"""Packages whose operands go through steps before attention, run by Triton's interpreter against the oracle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from codegen.emitted import normal, package, passes

from attncc import driver, reference, spec
from attncc.check.cases import Case
from attncc.codegen import modules
from attncc.codegen.aot import Failed, build_all
from attncc.codegen.legality import MANY
from attncc.codegen.offline import jobs
from attncc.codegen.triton import print_kernels
from attncc.device import find
from attncc.errors import Unsupported
from attncc.passes.lower import lines
from attncc.passes.lower.defaults import default_configs

GQA = "heads: {q: 4, kv: 2}\ndims: 16\ndtype: fp32\nmask: causal\n"
ROWS = {
    "rope": "prologue: [rope]",
    "rope of some columns": "prologue: ['rope(base=100, dims=6)']",
    "rope of neighbours": "prologue: ['rope(pairs=interleaved)']",
    "rope of some neighbours": "prologue: ['rope(pairs=interleaved, dims=10, on=k)']",
    "rope of values": "prologue: ['rope(on=v)', 'rope(dims=4, on=q)']",
    "rope by tables": "prologue: ['rope(cos=c, sin=s)']\ninputs: {c: {shape: [40, 8]}, s: {shape: [40, 8]}}",
    "rope by tables of sequences": "prologue: ['rope(cos=c, sin=s, on=q)']\n"
    "inputs: {c: {shape: [B, 1, 4], dtype: fp16}, s: {shape: [1, Sk, 4]}}",
    "rms norm": "prologue: [rms_norm]",
    "rms norm by weights": "prologue: ['rms_norm(weight=w, eps=0.1, on=q)', 'rms_norm(weight=u, on=k)']\n"
    "inputs: {w: {shape: [Dqk]}, u: {shape: [Hk, 16]}}",
    "l2 norm": "prologue: ['l2_norm(to=3, eps=2)', 'l2_norm(on=v)']",
    "silu": "prologue: ['silu(on=v)', 'silu(on=k)']",
    "temperature": "prologue: ['temperature(t[h], on=q)', 'temperature(u[b, hk], on=k)']\n"
    "inputs: {t: {shape: [Hq]}, u: {shape: [B, Hk]}}",
    "temperature of served heads": "prologue: ['temperature(t[hk] + h, on=q)']\ninputs: {t: {shape: [Hk]}}",
    "lerp": "prologue: ['lerp(x, 0.25, on=q)']\ninputs: {x: {shape: [B, Hq, Sq, Dqk], dtype: fp16}}",
    "lerp to what is shared": "prologue: ['lerp(x, w[hk], on=k)']\n"
    "inputs: {x: {shape: [1, Hk, Sk, 1]}, w: {shape: [Hk]}}",
    "hadamard": "prologue: [hadamard]",
    "hadamard of values": "prologue: ['hadamard(on=v)']",
    "several": "prologue: ['rms_norm(weight=w)', rope, 'temperature(2.0, on=q)']\ninputs: {w: {shape: [Dqk]}}",
}


PLACES = {
    "bshd": f"{GQA}layout: bshd",
    "varlen": f"{GQA}layout: varlen",
    "top left": f"{GQA}align: top_left",
    "offsets": f"{GQA}align: at\ninputs: {{at: {{shape: [B], dtype: int32}}}}",
    "odd heads": "heads: {q: 4, kv: 2}\ndims: {qk: 24, v: 7}\ndtype: fp16\nmask: causal",
    "wide heads": "heads: 2\ndims: {qk: 80, v: 200}\ndtype: fp32",
    "bf16": "heads: 2\ndims: 16\ndtype: bf16\nmask: causal",
    "served in turn": "heads: {q: 4, kv: 2, v: 4, map: tile}\ndims: 16\ndtype: fp32",
}


@pytest.mark.parametrize("place", PLACES)
def test_places(place: str) -> None:
    steps = "prologue: [rms_norm, 'rope(base=50)', 'l2_norm(on=v)']"
    cases = [Case(3, 21, 37)] if "varlen" in place else [Case(2, 21, 37), Case(2, 1, 33), Case(2, 9, 37, "unaligned")]
    passes(package(f"{PLACES[place]}\n{steps}").tiles(16, 16), *cases)


@pytest.mark.parametrize("form", ["paged(16)", "latent(rope=4)"])
def test_queries_before_other_storage(form: str) -> None:
    p = package(f"heads: {{q: 4, kv: 2}}\ndims: 16\ndtype: fp32\nmask: causal\nkv: {form}\nprologue: ['rope(on=q)']")
    passes(p.tiles(16, 16, split=1), Case(3, 2, 37), Case(1, 1, 20, "nan_keys"))


def test_one_sequences_rows_do_not_depend_on_where_tiles_begin() -> None:
    """Tokens of all sequences are counted in one line: tiles of them begin within sequences."""
    p = package(f"{GQA}prologue: [rope]").tiles(16, 16)
    passes(p, Case(5, 70, 70), Case(33, 1, 3))


@pytest.mark.parametrize("steps", ROWS)
def test_steps_of_rows(steps: str) -> None:
    p = package(GQA + ROWS[steps]).tiles(16, 16)
    passes(p, Case(2, 21, 37), Case(1, 37, 21, "nan_keys"), Case(2, 5, 37, "nan_around"))
    passes(p.tiles(16, 16, split=1), Case(2, 1, 37))


TRANSFORMED = {
    "behind a rope": "prologue: [rope, hadamard]",
    "behind a rope of neighbours": "prologue: ['rope(pairs=interleaved)', hadamard]",
    "before a rope": "prologue: [hadamard, rms_norm, 'rope(dims=32)']",
    "between ropes of neighbours": "prologue: ['rope(dims=32, pairs=interleaved)', hadamard, "
    "'rope(dims=32, pairs=interleaved)']",
    "before a convolution": "prologue: [hadamard, 'causal_conv(w, groups=heads)', hadamard]\n"
    "inputs: {w: {shape: [6, 64, 64, 2]}}",
}


@pytest.mark.parametrize("steps", TRANSFORMED)
def test_all_columns_beside_steps_of_some(steps: str) -> None:
    p = package(GQA.replace("16", "64") + TRANSFORMED[steps]).tiles(16, 16)
    passes(p, Case(2, 21, 37), Case(1, 5, 37, "nan_keys"))


QUANTISED = {
    "hadamard": "prologue: [hadamard]\nquantize: {q: fp8_e4m3(per=head), k: fp8_e4m3(per=head), "
    "v: fp8_e4m3(per=head), p: fp8_e4m3}",
    "several": "prologue: [rms_norm, rope]\nquantize: {q: int8(per=token), k: int8(per=block(16))}",
    "of one operand": "prologue: ['silu(on=v)']\nquantize: {k: int8, v: int8(per=channel)}",
}


@pytest.mark.parametrize("steps", QUANTISED)
def test_operands_are_quantised_behind_their_steps(steps: str) -> None:
    p = package(GQA.replace("fp32", "fp16").replace("16\n", "32\n") + QUANTISED[steps]).tiles(16, 16)
    passes(p, Case(2, 21, 37), Case(1, 37, 70, "nan_around"))


def test_numbers_are_rounded_once_on_their_way_into_few_bits() -> None:
    """Of numbers of 16 bits many lie half way between two of fp8: such as are made there first fall otherwise."""
    few = "prologue: [hadamard]\nquantize: {q: fp8_e4m3(per=head), k: fp8_e4m3(per=head)}"
    p = package(f"heads: 2\ndims: 32\ndtype: fp16\nmask: causal\n{few}")
    q, k, v = (normal(1, 2, 90, 32, seed=n).half() for n in range(3))
    lse = p.tiles(16, 16)(q, k, v, return_lse=True)[1]
    assert (lse - reference.outputs(p.attn, q.double(), k.double(), v.double()).lse).abs().max() < 1e-5


# -- steps that look at other tokens, or at all columns ----------------------------------------------

CONVOLVED = {
    "depthwise": "prologue: ['causal_conv(w, on=q)']\ninputs: {w: {shape: [4, 16, 3]}}",
    "of all heads": "prologue: ['causal_conv(w, kernel=2, bias=u)']\n"
    "inputs: {w: {shape: [6, 16, 2]}, u: {shape: [96]}}",
    "as torch has it": "prologue: ['causal_conv(w, bias=u, on=k)']\n"
    "inputs: {w: {shape: [32, 1, 4]}, u: {shape: [2, 16]}}",
    "heads": "prologue: ['causal_conv(w, groups=heads, bias=u)']\n"
    "inputs: {w: {shape: [6, Dqk, Dqk, 2]}, u: {shape: [6, Dqk]}}",
    "heads as torch has them": "prologue: ['causal_conv(w, groups=heads, on=v)']\n"
    "inputs: {w: {shape: [32, 16, 3], dtype: fp16}}",
    "one after the other": "prologue: ['causal_conv(a, bias=u)', 'causal_conv(c, groups=heads, bias=u)', l2_norm]\n"
    "inputs: {a: {shape: [6, 16, 2]}, c: {shape: [6, 16, 16, 3]}, u: {shape: [6, 16]}}",
    "a step between": "prologue: ['causal_conv(a, bias=u, on=k)', rms_norm, 'causal_conv(a, bias=u, on=k)']\n"
    "inputs: {a: {shape: [2, 16, 3]}, u: {shape: [2, 16]}}",
    "steps before": "prologue: ['rope(dims=6, on=v)', 'lerp(x, 0.3, on=v)', 'causal_conv(a, on=v)']\n"
    "inputs: {x: {shape: [B, 1, Sk, Dv]}, a: {shape: [2, 16, 2]}}",
    "values from before": "prologue: [value_shift]",
    "more values from before": "prologue: ['silu(on=v)', 'value_shift(fraction=0.8)', 'value_shift(fraction=0.2)']",
    "no values from before": "prologue: ['value_shift(fraction=0)']",
}


@pytest.mark.parametrize("steps", CONVOLVED)
def test_steps_over_tokens(steps: str) -> None:
    p = package(GQA + CONVOLVED[steps]).tiles(16, 16)
    passes(p, Case(2, 21, 37), Case(1, 90, 90), Case(2, 1, 5), Case(2, 5, 37, "nan_around"))


def test_packed_sequences_begin_with_zeros() -> None:
    p = package(f"{GQA}layout: varlen\n{CONVOLVED['one after the other']}").tiles(16, 16)
    passes(p, Case(3, 21, 37))
    passes(package(f"{GQA}layout: varlen\n{CONVOLVED['more values from before']}").tiles(16, 16), Case(3, 21, 37))


JOINED = "prologue: ['rms_norm(on=k)', 'mean_residual(scale=0.4)', 'l2_norm']"


@pytest.mark.parametrize("heads", ["4", "{q: 6, kv: 2}", "{q: 6, kv: 3, map: tile}", "{q: 3, kv: 1}"])
def test_queries_join_their_keys(heads: str) -> None:
    p = package(f"heads: {heads}\ndims: {{qk: 16, v: 8}}\ndtype: fp32\nmask: causal\n{JOINED}").tiles(16, 16)
    passes(p, Case(2, 21, 21), Case(1, 70, 70))


def test_queries_without_their_keys_are_refused() -> None:
    p = package(f"{GQA}{JOINED}").tiles(16, 16)
    with pytest.raises(ValueError, match=r"k must have shape .*Sq=5.*axis 2 is 7, not 5, as q has it"):
        p(normal(1, 4, 5, 16), normal(1, 2, 7, 16), normal(1, 2, 7, 16))


CCA = """
dims: 32
inputs:
  conv0: {shape: [HEADS, 32, 2]}
  bias0: {shape: [HEADS, 32]}
  conv1: {shape: [HEADS, 32, 32, 2]}
  bias1: {shape: [HEADS, 32]}
  temp: {shape: [Hk]}
mask: causal
prologue:
  - causal_conv(conv0, kernel=2, groups=depthwise, bias=bias0)
  - causal_conv(conv1, kernel=2, groups=heads, bias=bias1)
  - mean_residual(scale=0.5)
  - value_shift(fraction=0.5)
  - l2_norm(to=5.656854249492381, eps=0.0078125)
  - temperature(temp[hk], on=k)
  - rope(dims=16, base=5000000.0)
modes: [prefill]
"""


@pytest.mark.parametrize(("heads", "both"), [("2", "4"), ("{q: 4, kv: 2}", "6")])
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_compressed_convolutional_attention(heads: str, both: str, dtype: str) -> None:
    p = package(f"heads: {heads}\ndtype: {dtype}{CCA.replace('HEADS', both)}").tiles(16, 16)
    passes(p, Case(2, 40, 40), Case(1, 130, 130, "large_logits"), Case(1, 3, 3), Case(2, 21, 21, "nan_keys"))


LINES = {
    "compressed": f"heads: {{q: 4, kv: 2}}\n{CCA.replace('HEADS', '6')}",
    "taps of three": f"{GQA}{CONVOLVED['one after the other']}",
    "a step between": f"{GQA}prologue: ['causal_conv(c, groups=heads, bias=u)', rms_norm, "
    "'causal_conv(c, groups=heads)', 'value_shift', 'rope(dims=8)']\n"
    "inputs: {c: {shape: [6, 16, 16, 2]}, u: {shape: [6, 16]}}",
    "neighbours and a table": f"{GQA}prologue: ['causal_conv(c, groups=heads, on=k)', 'rope(cos=s, sin=s)']\n"
    "inputs: {c: {shape: [2, 16, 16, 2]}, s: {shape: [140, 8]}}",
}


@pytest.mark.parametrize("steps", LINES)
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_lines_of_several_tokens(steps: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row of a tile goes along a line of tokens, and the last lines of a sequence end sooner."""
    for text, size in {"ROWS": 16, "TILES": 1, "LONGEST": 5}.items():
        monkeypatch.setattr(lines, text, size)
    body = LINES[steps].replace("dtype: fp32\n", "")
    p = package(f"dtype: {dtype}\n{body}").tiles(16, 16)
    passes(p, Case(2, 40, 40), Case(1, 131, 131), Case(3, 3, 3), Case(2, 21, 21, "nan_around"))


ABSORBED = {
    "a matrix a head": "w: {shape: [Hq, 24, 32]}",
    "one matrix": "w: {shape: [40, Dqk], dtype: fp16}",
    "to some columns": "w: {shape: [1, 5, 16]}",
    "to many columns": "w: {shape: [Hq, 8, 20]}",
}


@pytest.mark.parametrize("matrix", ABSORBED)
def test_queries_absorb(matrix: str) -> None:
    body = "heads: {q: 4, kv: 1}\ndims: {qk: 32, v: 16}\ndtype: fp32\nmask: causal\nkv: latent(rope=16)\n"
    p = package(f"{body}prologue: ['absorb(w, on=q)']\ninputs: {{{ABSORBED[matrix]}}}").tiles(16, 16, split=1)
    passes(p, Case(2, 21, 37), Case(3, 1, 40), Case(2, 2, 37, "nan_around"))


def test_all_operands_absorb() -> None:
    p = package(
        "heads: {q: 4, kv: 2}\ndims: {qk: 16, v: 24}\ndtype: fp16\nlayout: bshd\n"
        "prologue: [rms_norm, 'absorb(w, on=k)', 'absorb(u, on=v)']\n"
        "inputs: {w: {shape: [Hk, 9, 11]}, u: {shape: [20, 24]}}"
    ).tiles(16, 16)
    passes(p, Case(2, 21, 37))


# -- what is not carried -----------------------------------------------------------------------------

REFUSED = {
    "prologue: [smooth]": "all steps but smooth",
    "prologue: ['rope(positions=packed)']": "positions=logical",
    "prologue: [rope, 'rope(dims=4, on=k)']": "ropes of one kind",
    "prologue: ['rope(cos=c, sin=c)']\ninputs: {c: {shape: [9, n]}}": "tables of as many columns",
    "prologue: ['value_shift']\nkv: latent(rope=4)": "queries alone",
    "prologue: ['rms_norm(weight=w)']\ninputs: {w: {shape: [4, 16]}}": "weights [D] or [H, D]",
    "prologue: ['lerp(x, 0.5, on=q)']\ninputs: {x: {shape: [B, Hk, Sq, 16]}}": "axes those of the operand",
    "prologue: ['causal_conv(w)']\ninputs: {w: {shape: [4, 16, 2]}}": "as many channels",
    "prologue: ['causal_conv(w, on=q)', 'causal_conv(w, on=v)']\ninputs: {w: {shape: [2, 16, 2]}}": "as many channels",
    "prologue: ['causal_conv(w, on=k)', 'causal_conv(w, on=v)']\n"
    "inputs: {w: {shape: [2, 16, 2]}}": "on the same operands",
    "prologue: ['causal_conv(w, groups=heads, on=v)']\ninputs: {w: {shape: [2, 16, 16, 129]}}": "65536 bytes",
    "prologue: [mean_residual]\nlayout: varlen": "the layouts bhsd and bshd",
    "prologue: [mean_residual, 'absorb(w)']\ninputs: {w: {shape: [16, 16]}}": "mean_residual or absorb",
    "prologue: ['absorb(w)', 'silu(on=q)']\ninputs: {w: {shape: [16, 16]}}": "behind the other steps",
    "prologue: ['rope(on=q)', 'absorb(w)']\ninputs: {w: {shape: [16, 16]}}": "rope or absorb",
    "prologue: ['absorb(w)']\ninputs: {w: {shape: [16, n]}}": "known when compiled",
    "prologue: ['absorb(w)']\ninputs: {w: {shape: [2, 16, 16]}}": "of the operand's heads",
    "prologue: ['absorb(w)']\ninputs: {w: {shape: [600, 8]}}": "of up to 576 columns",
    "prologue: ['absorb(w)']\ninputs: {w: {shape: [16, 16]}}\nquantize: {q: int8}": "are quantised then",
    "prologue: ['hadamard(on=k)', 'rope(dims=12, on=k)']": "beside ropes of all of them or of half",
    "prologue: [hadamard, 'absorb(w)']\ninputs: {w: {shape: [16, 16]}}": "hadamard or absorb",
}


@pytest.mark.parametrize("more", REFUSED)
def test_what_is_not_carried(more: str) -> None:
    with pytest.raises(Unsupported) as error:
        driver.lower(spec.loads(f"attncc: 1\nname: odd\n{GQA}{more}\n").attention)
    assert error.value.key == "prologue"
    assert REFUSED[more] in str(error.value.hint)


def test_cpus_have_no_kernels_of_steps(tmp_path: Path) -> None:
    for key in ("prologue: [silu]", "epilogue: [skip(1)]"):
        with pytest.raises(Unsupported, match="no steps beside attention"):
            driver.compile(spec.loads(f"attncc: 1\nname: odd\n{GQA}{key}\n"), tmp_path, ["cpu"])


@pytest.mark.parametrize("example", ["llama", "qwen3", "cca", "ccgqa", "mla_absorbed", "softpag", "fp8_attention"])
def test_kernels_of_steps_compile_without_spills(example: str, tmp_path: Path) -> None:
    loaded = driver.load(Path(__file__).parents[2] / "examples" / f"{example}.yaml")
    loaded = replace(loaded, attention=replace(loaded.attention, modes=("prefill",)))
    attn, program = driver.lower(loaded.attention)
    kernels = tmp_path / "kernels.py"
    kernels.write_text(modules.kernels_module(attn, print_kernels(program)[0], []))
    config = dict(default_configs(attn, find("sm_90"), with_engine=False)[0][-1][1])
    wanted = {n: j for n, j in jobs(program, str(kernels), find("sm_90"), config).items() if "logue" in n}
    assert wanted
    for name, outcome in zip(wanted, build_all(list(wanted.values())), strict=True):
        assert not isinstance(outcome, Failed), (name, outcome.reason)
        assert outcome.shared_bytes <= find("sm_90").shared_bytes_per_block, name
        assert outcome.loop.get("spill_load", 0) <= MANY, name
        assert outcome.spill_bytes == 0 or example in ("cca", "ccgqa"), name
