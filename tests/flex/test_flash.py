"""Which calls get FlashAttention 4's kernel, and what is said of an install that is broken."""

import sys
import warnings

import pytest
import torch

from flexlocal import Rotary, Window, dispatch
from flexlocal.cli import doctor
from flexlocal.flex import dense, flash, flash_attention
from flexlocal.flex.tuning import FLASH, STOCK, Entry, overriding
from flexlocal.spec import Inputs, Spec

H100 = (9, 0)


class OnGPU(torch.Tensor):
    """Says that it is on a GPU."""

    device = torch.device("cuda", 0)


def on_gpu(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype).as_subclass(OnGPU)


SLIDES, STANDS = (Window(1024, causal=True, exact=exact) for exact in (True, False))


def preferred(window=SLIDES, **arguments):
    """Of a call over ``window``; arguments are fields of ``Spec`` and ``Inputs``."""
    known = {name: arguments.pop(name) for name in Spec._fields if name in arguments}
    return flash.preferred(Spec(window, **known), Inputs(**arguments))


@pytest.fixture
def measured(monkeypatch):
    """A function that says for which calls the kernels are the faster ones, all heads of 128."""

    def faster(*kinds):
        known = Entry(H100, 128, 1025, STOCK, frozenset(kinds))
        monkeypatch.setattr(flash, "nearest", lambda *_: known)

    monkeypatch.setattr(flash, "capability", lambda device: H100)
    monkeypatch.setattr(flash, "installed", lambda: True)
    monkeypatch.setattr(flash, "broken", lambda: None)
    return faster


Q = on_gpu(2, 4, 2048, 128)
VIEW = on_gpu(2, 2048, 4, 128).transpose(1, 2)
ROW = on_gpu(2001, 4, 128).transpose(0, 1)[None]
SUMS = torch.tensor([0, 300, 2001])
UNKNOWN = [
    dict.fromkeys("qkv", on_gpu(2, 4, 2048, 96)),
    dict.fromkeys("qkv", on_gpu(2, 4, 2048, 128, dtype=torch.float32)),
    {"v": on_gpu(2, 4, 2048, 64)},
    {"k": on_gpu(2, 4, 1999, 128), "v": on_gpu(2, 4, 1999, 128), "q_offset": 0},
    {"mask": torch.ones(2, 2048, dtype=torch.bool)},
    {"bias": torch.zeros(4, 1024, 2048)},
    {"shared_qk": True},
    {"scale": 0.0},
    {"scale": -0.3},
    {"dropout": 0.1},
    {"xpos_base": 512.0},
    {"kernel_options": ()},
    {"sinks": torch.zeros(2)},
    {"sinks": torch.zeros(4, dtype=torch.float64)},
    {"documents": torch.zeros(2048, dtype=torch.int32)},
    {"q_offset": 1, "kv_offset": 1},
    {**dict.fromkeys("qkv", ROW), "cu_seqlens": SUMS, "q_offset": 1, "kv_offset": 1},
]
KNOWN_DIRECTLY = [
    {"q": VIEW},
    {"v": VIEW},
    dict.fromkeys("qkv", on_gpu(2, 4, 2001, 128)),
    dict.fromkeys("qkv", on_gpu(2, 4, 2048, 128, dtype=torch.float16)),
    dict.fromkeys("qkv", on_gpu(5, 2048, 128)),
    dict.fromkeys("qkv", on_gpu(5, 2001, 128)),
    dict.fromkeys("kv", on_gpu(2, 2, 2048, 128)),
    {"softcap": 30.0},
    {"return_lse": True},
    {"sinks": torch.zeros(4)},
    {"inv_freq": Rotary(128).inv_freq},
    {**dict.fromkeys("qkv", ROW), "cu_seqlens": SUMS},
    {**dict.fromkeys("qkv", ROW), "cu_seqlens": SUMS, "documents": torch.zeros(1, 2001).int()},
]


@pytest.mark.parametrize(
    ("changes", "way"),
    [*((changes, None) for changes in UNKNOWN), *((x, "flash") for x in KNOWN_DIRECTLY)],
    ids=lambda x: " ".join(x) if isinstance(x, dict) else "",
)
def test_flash_attention_4_gets_what_it_was_tried_on(changes, way, measured):
    measured("forward", "training", "standing")
    tried = {"q": Q, "k": Q, "v": Q}
    assert preferred(**tried) == ("flash", None)
    assert preferred(STANDS, **tried) == ("flash by flex", None)
    assert preferred(**{**tried, **changes}) == (way, None)
    as_tried = "inv_freq" in changes or changes.get("q", Q).shape == (5, 2048, 128)
    by_lists = "flash by flex" if as_tried else None
    assert preferred(STANDS, **{**tried, **changes}) == (by_lists, None)


def test_flash_attention_4_gets_what_it_was_measured_to_be_faster_at(measured, monkeypatch):
    tried = {"q": Q, "k": Q, "v": Q}
    wanting = {**tried, "k": on_gpu(2, 4, 2048, 128).requires_grad_()}
    packed = {**dict.fromkeys("qkv", ROW), "cu_seqlens": SUMS}
    measured("training")
    assert preferred(**tried) == preferred(STANDS, **wanting) == (None, None)
    assert preferred(**wanting) == ("flash", None)
    with torch.no_grad():
        assert preferred(**wanting) == (None, None)
    assert preferred(**packed) == (None, None)
    measured("forward")
    assert preferred(**wanting) == preferred(**packed) == (None, None)
    measured("forward", "training")  # documents cost these kernels more
    assert preferred(**packed) == ("flash", None)
    monkeypatch.setattr(flash, "nearest", lambda *_: None)  # measured nowhere near
    assert preferred(**tried) == preferred(**wanting) == (None, None)


def test_a_sweep_gets_what_it_asks_for(measured):
    tried = {"q": Q, "k": Q, "v": Q}
    measured()
    with overriding(FLASH):
        assert preferred(**tried) == ("flash", None)
        assert preferred(STANDS, **tried) == ("flash by flex", None)
    measured("forward", "standing")
    with overriding(STOCK):
        assert preferred(**tried) == preferred(STANDS, **tried) == (None, None)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """A function that installs what calls itself flash-attn-4."""

    def made(version, code):
        package = tmp_path / "flash_attn" / "cute"
        package.mkdir(parents=True)
        (package.parent / "__init__.py").touch()
        (package / "__init__.py").touch()
        (package / "interface.py").write_text(code)
        if version is not None:
            metadata = tmp_path / f"flash_attn_4-{version}.dist-info" / "METADATA"
            metadata.parent.mkdir()
            metadata.write_text(f"Metadata-Version: 2.1\nName: flash-attn-4\nVersion: {version}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface"):
            monkeypatch.delitem(sys.modules, name, raising=False)

    def forgotten():
        flash._installed.cache_clear()
        flash._broken.cache_clear()

    forgotten()
    yield made
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        del sys.modules[name]
    monkeypatch.undo()  # before anybody asks again
    forgotten()


WHOLE = "\n".join(
    f"def {name}(q, k, v, {', '.join(asked)}): ..." for name, asked in flash_attention.ASKED.items()
)
OTHER = WHOLE.replace("deterministic", "repeatable")
WARNS = "import warnings\nwarnings.warn('an old name', DeprecationWarning)\n"
RAISES = "raise RuntimeError('no compiler\\nat all')"
FAULT = r"flash-attn-4 cannot be imported \(RuntimeError: no compiler\)"


@pytest.mark.parametrize(
    ("version", "code", "fault"),
    [
        ("4.0.0b36", WHOLE, None),
        ("4.0.0b40", WHOLE, None),
        ("4.0.0", WHOLE, None),
        ("4.1.2b1", WHOLE, None),
        (None, WHOLE, None),
        ("4.0.0b36", WARNS + WHOLE, None),  # pytest makes an error of a warning
        ("4.0.0b35", "", "flash-attn-4 4.0.0b35 gives wrong gradients, 4.0.0b36 or later would do"),
        ("4.0.0b50", OTHER, "flash-attn-4 4.0.0b50 has no _flash_attn_bwd(deterministic=)"),
        ("4.0.0b50", "", "flash-attn-4 4.0.0b50 has no _flash_attn_fwd"),
        ("4.0.0b9", RAISES, "flash-attn-4 4.0.0b9 gives wrong gradients"),
        ("4.0.0b36", RAISES, "flash-attn-4 cannot be imported (RuntimeError: no compiler)"),
        (None, "import nothing_of_that_name", "flash-attn-4 cannot be imported (ModuleNotFound"),
    ],
)
def test_a_broken_install_is_seen(version, code, fault, install):
    install(version, code)
    assert flash.installed()
    if fault is None:
        assert flash.broken() is None
    else:
        assert flash.broken().startswith(fault)


def test_auto_goes_on_without_a_broken_install_and_says_so_once(install, monkeypatch):
    install("4.0.0b36", RAISES)
    for module in (flash, dense):
        monkeypatch.setattr(module, "capability", lambda device: H100)
    monkeypatch.setattr(dispatch, "_SAID", set())
    monkeypatch.setattr(dispatch.support, "refusal", lambda *_: None)
    monkeypatch.setattr(dispatch.flex, "prepared", lambda spec, inputs, engine: engine)
    spec = Spec(SLIDES)
    choice = dispatch.choose(spec, Inputs(Q, Q, Q))
    assert (choice.backend, choice.engine) == ("flex", "flex")
    assert "FlashAttention 4's would be faster, but flash-attn-4 cannot be" in choice.reason
    with pytest.warns(UserWarning, match=f"goes on without FlashAttention 4's kernel: {FAULT}"):
        run, _ = dispatch._prepare(spec, Inputs(Q, Q, Q))
    assert run == "flex"  # no kernel of FlashAttention's
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dispatch._prepare(spec, Inputs(Q, Q, Q))
    assert ("FlashAttention 4", f"not taken: {flash.broken()}") in doctor.report()


def test_what_is_not_installed_is_not_missed():
    flash._installed.cache_clear()
    if not flash.installed():
        assert "FlashAttention 4" not in dict(doctor.report())
