"""The drop-in on weights that are moved around each layer: group offloading, and accelerate's sequential offloading."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.hooks import group_offloading
from diffusers.hooks.group_offloading import ModuleGroup, apply_group_offloading
from torch import nn

import handscroll
from autoencoder_cases import alike
from handscroll.errors import UsageError

SIZES = ((1, 1), (3, 5))  # of latents: of one position, attentions are not linear
Offload = Callable[[Any, Path], None]


def in_groups(kind: str, **options: Any) -> Offload:
    """diffusers' group offloading to files: what is not loaded at that time holds numbers of no meaning."""

    def offload(vae: Any, folder: Path) -> None:
        apply_group_offloading(
            vae, torch.device("cpu"), torch.device("cpu"), kind, offload_to_disk_path=str(folder), **options
        )
        for parameter in vae.parameters():
            parameter.data.fill_(torch.nan)

    return offload


class AlignDevicesHook:
    """What accelerate's hook of this name does for sequential offloading: weights lie on the meta device in between."""

    def __init__(self, module: nn.Module) -> None:
        self.offload, self.execution_device = True, torch.device("cpu")
        self.weights = {name: value.data for name, value in module.named_parameters(recurse=False)}
        self.calls = 0
        self.post_forward(module, None)

    def pre_forward(self, module: nn.Module, *args: Any) -> Any:
        self.calls += 1
        for name, value in self.weights.items():
            setattr(module, name, nn.Parameter(value, requires_grad=False))
        return args, {}

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        for name, value in self.weights.items():
            setattr(module, name, nn.Parameter(value.to("meta"), requires_grad=False))
        return output


def sequentially(vae: Any, folder: Path) -> None:
    for module in vae.modules():
        if not list(module.parameters(recurse=False)):
            continue
        hook = AlignDevicesHook(module)

        def forward(module: nn.Module, hook: AlignDevicesHook, plain: Callable[..., Any], *args: Any) -> Any:
            hook.pre_forward(module)
            return hook.post_forward(module, plain(*args))

        forward.__module__ = "accelerate.hooks"
        module._hf_hook, module._old_forward = hook, module.forward
        module.forward = functools.partial(forward, module, hook, module.forward)


OFFLOADS: dict[str, Offload] = {
    "leaf by leaf": in_groups("leaf_level"),
    "in blocks": in_groups("block_level", num_blocks_per_group=1, block_modules=["decoder", "encoder"]),
    "in blocks of two": in_groups("block_level", num_blocks_per_group=2, block_modules=["decoder", "encoder"]),
    "as a whole": in_groups("block_level", num_blocks_per_group=1),
    "sequentially": sequentially,
}


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("offload", OFFLOADS)
def test_offloaded_weights_are_brought_for_each_layer(
    vae: Any, offload: str, when: str, size: tuple[int, int], tmp_path: Path
) -> None:
    z, x = torch.randn(2, 32, *size), torch.randn(2, 3, 32 * size[0], 32 * size[1])
    plain = vae.decode(z).sample, vae.encode(x).latent
    if when == "after":
        handscroll.attach(vae)
    OFFLOADS[offload](vae, tmp_path)
    if when == "before":
        handscroll.attach(vae, memory="300MiB")
    for _ in range(2):
        assert alike(vae.decode(z).sample, plain[0])
        assert alike(vae.encode(x).latent, plain[1])


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_groups_are_loaded_when_they_are_needed_and_left_as_they_were(
    vae: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[ModuleGroup] = []
    most = [0]
    onload, offload = ModuleGroup.onload_, ModuleGroup.offload_

    def counted(group: ModuleGroup) -> None:
        loaded.append(group)
        alive.add(id(group))
        most[0] = max(most[0], len(alive))
        onload(group)

    def ended(group: ModuleGroup) -> None:
        alive.discard(id(group))
        offload(group)

    alive: set[int] = set()
    # diffusers takes this from accelerate, where that is there.
    monkeypatch.setattr(group_offloading, "send_to_device", lambda given, *_, **__: given, raising=False)
    monkeypatch.setattr(ModuleGroup, "onload_", counted)
    monkeypatch.setattr(ModuleGroup, "offload_", ended)
    cpu = torch.device("cpu")
    apply_group_offloading(
        vae, cpu, cpu, kind, num_blocks_per_group=1, block_modules=["decoder", "encoder"] if "block" in kind else None
    )
    z = torch.randn(1, 32, 3, 3)
    vae.decode(z)
    plain, used = len(loaded), {id(group) for group in loaded}
    loaded.clear()
    handscroll.attach(vae)
    vae.decode(z)
    assert {id(group) for group in loaded} >= used
    assert len(loaded) >= plain
    assert not alive
    layers = 10  # of a block's own leaves, never of the whole decoder
    assert most[0] <= layers


def test_casting_and_groups_together(vae: Any, tmp_path: Path) -> None:
    vae.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    z = torch.randn(1, 32, 3, 2)
    plain = vae.decode(z).sample
    OFFLOADS["leaf by leaf"](vae, tmp_path)
    handscroll.attach(vae)
    assert alike(vae.decode(z).sample, plain)


def test_hooks_that_do_more_than_move_weights_run_the_whole_module(vae: Any) -> None:
    class Louder(AlignDevicesHook):
        def post_forward(self, module: nn.Module, output: Any) -> Any:
            super().post_forward(module, output)
            return None if output is None else output * 2

    for module in (vae.decoder.conv_in, vae.decoder.conv_out):
        hook = Louder(module)

        def forward(module: nn.Module, hook: Louder, plain: Callable[..., Any], *args: Any) -> Any:
            hook.pre_forward(module)
            return hook.post_forward(module, plain(*args))

        forward.__module__ = "accelerate.hooks"
        module._hf_hook, module._old_forward = hook, module.forward
        module.forward = functools.partial(forward, module, hook, module.forward)
    z = torch.randn(1, 32, 3, 3)
    plain = vae.decode(z).sample
    handscroll.attach(vae)
    assert torch.equal(vae.decode(z).sample, plain)


def test_hooks_that_were_taken_off_leave_rows_to_run(vae: Any) -> None:
    z = torch.randn(1, 32, 3, 3)
    plain = vae.decode(z).sample
    cpu = torch.device("cpu")
    apply_group_offloading(vae, cpu, cpu, "leaf_level")
    for module in vae.modules():
        if hasattr(module, "_diffusers_hook"):
            module._diffusers_hook.remove_hook("group_offloading", recurse=False)
    handscroll.attach(vae, memory="300MiB")  # which refuses what rows cannot run through
    assert alike(vae.decode(z).sample, plain)


def test_weights_that_nothing_brings_are_said_before_any_work(vae: Any) -> None:
    lost = copy.deepcopy(vae)
    lost.decoder.to("meta")
    with pytest.raises(UsageError, match="meta device"):
        handscroll.attach(lost, memory="300MiB")
