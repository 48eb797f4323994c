"""Autoencoders changed in ways that no table of PyTorch lists: attached they give what they give plain."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from diffusers import SanaPipeline
from diffusers.models.attention_processor import SanaMultiscaleAttnProcessor2_0
from diffusers.models.autoencoders.autoencoder_dc import ResBlock
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import handscroll
import miniatures
from autoencoder_cases import alike, as_if_trained
from handscroll.errors import UsageError
from handscroll.integrations.diffusers import attachment

LATENT = (1, 32, 3, 5)
Patch = pytest.MonkeyPatch
Change = Callable[[Any, Patch], object]


def doubled(plain: Callable[..., Any]) -> Callable[..., Any]:
    """In place of a method or a bound one: twice what it gives."""

    @functools.wraps(plain)
    def twice(*given: Any, **named: Any) -> Any:
        return plain(*given, **named) * 2

    return twice


def moved_and_replaced(vae: Any, patch: Patch) -> None:
    """As accelerate leaves a module whose weights it moves; and then somebody sets a `forward`."""
    conv = vae.decoder.conv_out
    AlignDevicesHook = type("AlignDevicesHook", (), {"offload": False, "execution_device": None})
    conv._hf_hook, conv._old_forward = AlignDevicesHook(), conv.forward
    conv.forward = functools.partial(doubled(conv.forward))


def a_weight_that_is_no_parameter(vae: Any, patch: Patch) -> None:
    conv = vae.decoder.conv_out
    weight = conv.weight.detach().clone()
    del conv._parameters["weight"]
    conv.weight = weight.requires_grad_(True)


def blocks_in_a_list(vae: Any, patch: Patch) -> None:
    blocks = list(vae.decoder.up_blocks)
    del vae.decoder.up_blocks
    vae.decoder.up_blocks = blocks
    blocks[0][0].register_forward_hook(lambda module, given, out: out * 2)


def a_layer_that_is_no_submodule(vae: Any, patch: Patch) -> None:
    conv = vae.decoder.conv_in
    del vae.decoder.conv_in
    vae.decoder.__dict__["conv_in"] = conv
    conv.register_forward_hook(lambda module, given, out: out * 2)


def a_class_that_was_patched(of: type, name: str) -> Change:
    def change(vae: Any, patch: Patch) -> None:
        patch.setattr(of, name, doubled(getattr(of, name)))

    return change


CHANGES: dict[str, Change] = {
    "moved, then replaced": moved_and_replaced,
    "a weight that is no parameter": a_weight_that_is_no_parameter,
    "blocks in a list": blocks_in_a_list,
    "a layer that is no submodule": a_layer_that_is_no_submodule,
    "ResBlock.forward": a_class_that_was_patched(ResBlock, "forward"),
    "Conv2d.forward": a_class_that_was_patched(nn.Conv2d, "forward"),
    "Conv2d._conv_forward": a_class_that_was_patched(nn.Conv2d, "_conv_forward"),
    "the attention's processor": a_class_that_was_patched(SanaMultiscaleAttnProcessor2_0, "__call__"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_was_changed_is_run_whole_or_refused(vae: Any, change: Change, monkeypatch: Patch) -> None:
    z = torch.randn(LATENT)
    before = vae.decode(z).sample
    change(vae, monkeypatch)
    plain = vae.decode(z).sample
    handscroll.attach(vae)
    found = vae.decode(z).sample
    assert alike(found, plain)
    assert (found.grad_fn is None) == (plain.grad_fn is None)
    if change is not a_weight_that_is_no_parameter:
        assert not alike(plain, before)
    handscroll.detach(vae)
    with pytest.raises(UsageError, match=r"^memory cannot be kept: [^\n]*$"):
        handscroll.attach(vae, memory="1GiB")


# What watches or changes PyTorch's calls


class Doubled(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out * 2 if func is torch.conv2d else out


class Counted(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        Counted.calls += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Doubled, Counted, nullcontext])
def test_modes_of_pytorch_see_the_calls_that_they_would_see(
    vae: Any, mode: Callable[[], AbstractContextManager[Any]]
) -> None:
    z = torch.randn(LATENT)

    def decoded() -> tuple[Tensor, int]:
        Counted.calls = 0
        with mode():
            return vae.decode(z).sample, Counted.calls

    plain, calls = decoded()
    handscroll.attach(vae)
    found, seen = decoded()
    assert alike(found, plain)
    assert seen == calls


def test_a_default_device_is_no_such_mode(vae: Any, monkeypatch: Patch) -> None:
    handscroll.attach(vae)
    monkeypatch.setattr(attachment, "decode_rows", lambda *_, **__: pytest.fail("by rows, as it should"))
    with torch.device("cpu"), pytest.raises(pytest.fail.Exception):
        vae.decode(torch.randn(LATENT))


def test_an_ensemble_of_weights(vae: Any) -> None:
    z = torch.randn(LATENT)
    states = [{name: value * scale for name, value in vae.state_dict().items()} for scale in (1.0, 0.5)]
    stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}

    def decoded() -> Tensor:
        call: Any = lambda state: torch.func.functional_call(Decoding(vae), state, (z,))  # noqa: E731
        return torch.func.vmap(call)({f"vae.{name}": value for name, value in stacked.items()})

    plain = decoded()
    handscroll.attach(vae)
    assert alike(decoded(), plain)


class Decoding(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, z: Tensor) -> Tensor:
        return self.vae.decode(z).sample


# Copies


def test_a_shallow_copy_uses_its_own_layers(vae: Any) -> None:
    z = torch.randn(LATENT)
    handscroll.attach(vae)
    other = copy.copy(vae)
    other._modules = dict(vae._modules)
    torch.manual_seed(2)
    other.decoder = as_if_trained(miniatures.make_autoencoder()).decoder
    plain = type(other)._decode(other, z)
    assert alike(other.decode(z).sample, plain)
    assert not alike(vae.decode(z).sample, plain)
    other.enable_slicing()
    assert alike(other.decode(torch.cat([z, z])).sample[1:], plain)


def test_a_shallow_copy_of_a_pipeline_is_asked_about_itself(vae: Any, tmp_path: Any) -> None:
    class Pipeline(SanaPipeline):
        def __init__(self, vae: Any) -> None:
            self.register_to_config()
            self.vae = vae

        def check_inputs(self, prompt: Any, height: int, width: int) -> None:
            """Nothing is wrong with them."""

        def __call__(self, prompt: Any, height: int, width: int, output_type: str = "pil", count: int = 1) -> str:
            num_images_per_prompt = count
            self.check_inputs(prompt, height, width)
            return f"{num_images_per_prompt} painted"

    pipe = Pipeline(vae)
    handscroll.attach(pipe, memory="64MiB")
    other = copy.copy(pipe)
    assert other("a", 96, 96) == "1 painted"
    with pytest.raises(handscroll.errors.BudgetError):
        other("a", 9600, 9600)
    assert other("a", 9600, 9600, output_type="latent") == "1 painted"
    del pipe
    assert other("a", 96, 96) == "1 painted"
    other.vae = None
    assert other("a", 9600, 9600) == "1 painted"


@pytest.mark.parametrize("mode", [lambda: torch.autocast("cpu", torch.bfloat16), Counted])
def test_modes_in_which_no_memory_is_kept_are_refused_before_the_first_step(
    vae: Any, mode: Callable[[], AbstractContextManager[Any]]
) -> None:
    class Pipeline(SanaPipeline):
        def __init__(self, vae: Any) -> None:
            self.register_to_config()
            self.vae = vae

        def check_inputs(self, height: int, width: int) -> None:
            """Nothing is wrong with them."""

        def __call__(self, height: int, width: int) -> str:
            self.check_inputs(height, width)
            return "painted"

    pipe = Pipeline(vae)
    handscroll.attach(pipe, memory="64MiB")
    assert pipe(96, 96) == "painted"
    with mode(), pytest.raises(UsageError, match="memory cannot be kept"):
        pipe(96, 96)


# Memory


@pytest.mark.parametrize("compiled", ["a function around it", "decode"])
def test_compiled_code_keeps_the_memory_too(vae: Any, compiled: str) -> None:
    z = torch.randn(LATENT)
    plain = vae.decode(z).sample
    handscroll.attach(vae, memory="300MiB")
    if compiled == "decode":
        vae.decode = torch.compile(vae.decode, backend="eager")
        decode = lambda: vae.decode(z).sample  # noqa: E731
    else:
        decode = torch.compile(lambda: vae.decode(z).sample, backend="eager")
    assert alike(decode(), plain)
    handscroll.attach(vae, memory=1)
    with pytest.raises(handscroll.errors.BudgetError):
        decode()


def test_slicing_holds_every_result_twice(vae: Any) -> None:
    handscroll.attach(vae, memory="64MiB")
    z = torch.randn(2, 32, 12, 12)
    vae.decode(z)
    vae.enable_slicing()
    vae.decode(z)
    with pytest.raises(handscroll.errors.BudgetError):
        vae.decode(torch.cat([z] * 24))
    vae.disable_slicing()
    vae.decode(z[:1])


@pytest.mark.parametrize("encoder", ["none", "gone"])
def test_an_autoencoder_that_only_decodes(vae: Any, encoder: str) -> None:
    if encoder == "none":
        vae.encoder = None
    else:
        del vae.encoder
    handscroll.attach(vae, memory="300MiB")
    vae.decode(torch.randn(LATENT))


def test_half_an_autoencoder_is_refused_in_words(vae: Any) -> None:
    vae.encoder = nn.Identity()
    with pytest.raises(UsageError, match="memory cannot be kept"):
        handscroll.attach(vae, memory="300MiB")


@pytest.mark.parametrize(
    "memory",
    [10**400, -(10**5000), torch.zeros(2, 2), torch.tensor(5, device="meta"), 2**62, float("inf")],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("name", ["memory", "strip_rows"])
def test_amounts_that_cannot_be_meant(vae: Any, memory: Any, name: str) -> None:
    with pytest.raises(UsageError) as caught:
        handscroll.attach(vae, **{name: memory})
    assert "\n" not in str(caught.value)
