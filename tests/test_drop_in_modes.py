"""The drop-in's rule: the plain result in every mode in which the module runs, or whole and said once, or refused."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC
from diffusers.models.attention_processor import SanaMultiscaleAttnProcessor2_0
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.nn.utils import prune as prune_module

import handscroll
import miniatures
from autoencoder_cases import CASES, EXACT, F32, alike, as_if_trained, latent_of, steady_autoencoder
from handscroll.errors import SizeError, UsageError

LATENT, PICTURE = (2, 32, 3, 5), (2, 3, 96, 160)
Change = Callable[[Any], object]


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What the drop-in has said so far."""
    caplog.set_level(logging.WARNING, logger="handscroll")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "handscroll"]


def both(vae: Any, rounded_to: torch.dtype | None = None) -> list[Tensor]:
    """A decode and an encode of the same inputs each time."""
    generator = torch.Generator().manual_seed(3)
    given = (torch.randn(shape, generator=generator).to(rounded_to or vae.dtype) for shape in (LATENT, PICTURE))
    z, x = (each.to(vae.dtype) for each in given)
    return [vae.decode(z).sample, vae.encode(x).latent]


def assert_alike(ours: list[Tensor], plain: list[Tensor], most: float = EXACT) -> None:
    for one, other in zip(ours, plain, strict=True):
        assert alike(one, other, most)


def as_plain(vae: Any, most: float = EXACT) -> None:
    """Attached, the autoencoder gives what it gives by itself."""
    plain = both(vae)
    handscroll.attach(vae)
    assert_alike(both(vae), plain, most)


# Gradients


@pytest.mark.parametrize("wanted", ["weights", "input", "both"])
def test_gradients_are_those_of_the_plain_module(vae: Any, wanted: str, lines: Callable[[], list[str]]) -> None:
    vae.requires_grad_(wanted != "input")
    z = torch.randn(LATENT, requires_grad=wanted != "weights")

    def gradients() -> list[Tensor]:
        vae.zero_grad()
        z.grad = None
        out = vae.decode(z).sample
        assert out.grad_fn is not None
        out.square().mean().backward()
        leaves = [*vae.decoder.parameters(), z]
        return [leaf.grad.clone() for leaf in leaves if leaf.grad is not None]

    plain = gradients()
    handscroll.attach(vae)
    assert_alike(gradients(), plain, 0)
    gradients()
    assert len(lines()) == 1
    assert "gradients are wanted" in lines()[0]
    with torch.no_grad():
        vae.decode(z)
    assert len(lines()) == 1


def test_nothing_is_said_where_nobody_wants_gradients(vae: Any, lines: Callable[[], list[str]]) -> None:
    handscroll.attach(vae)
    both(vae)  # weights that are frozen
    vae.requires_grad_(True)
    with torch.inference_mode():
        both(vae)
    assert not lines()


def test_a_loss_with_another_term_still_trains_the_autoencoder(vae: Any) -> None:
    handscroll.attach(vae.requires_grad_(True).train())
    x = torch.randn(PICTURE)
    (F.mse_loss(vae(x).sample, x) + sum(each.square().sum() for each in vae.decoder.conv_out.parameters())).backward()
    assert all(each.grad is not None for each in vae.parameters())


def test_a_moving_average_follows_the_training_of_an_attached_autoencoder() -> None:
    torch.manual_seed(4)
    plain = AutoencoderDC(**F32).train()
    attached = handscroll.attach(copy.deepcopy(plain))
    x = torch.randn(2, 3, 64, 32)
    averages = []
    for vae in (plain, attached):
        average = EMAModel(vae.parameters(), decay=0.5)
        optimizer = torch.optim.SGD(vae.parameters(), lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            F.mse_loss(vae(x).sample, x).backward()
            optimizer.step()
            average.step(vae.parameters())
        averages.append(average.shadow_params)
    assert all(torch.equal(one, other) for one, other in zip(*averages, strict=True))


def test_forward_derivatives_are_kept(vae: Any) -> None:
    z, tangent = torch.randn(1, 32, 2, 2), torch.randn(1, 32, 2, 2)

    def derivative() -> Tensor:
        return torch.func.jvp(lambda each: vae.decode(each).sample, (z,), (tangent,))[1]

    plain = derivative()
    handscroll.attach(vae)
    assert torch.equal(derivative(), plain)


# Types


@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16])
def test_weights_that_are_cast_for_each_layer_compute_in_the_type_that_they_are_cast_to(
    vae: Any, storage: torch.dtype, lines: Callable[[], list[str]]
) -> None:
    vae.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    as_plain(vae)
    assert {each.weight.dtype for each in vae.modules() if isinstance(each, nn.Conv2d)} == {storage}
    assert not lines()
    tiny = torch.randn(1, 32, 1, 1)  # whose attention is not linear
    ours = vae.decode(tiny).sample
    handscroll.detach(vae)
    assert_alike([ours], [vae.decode(tiny).sample])


def test_casting_that_is_turned_on_later_is_seen(vae: Any) -> None:
    handscroll.attach(vae)
    vae.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    ours = both(vae)
    handscroll.detach(vae)
    assert_alike(ours, both(vae))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_what_it_gives_the_plain_module(
    vae: Any, dtype: torch.dtype, lines: Callable[[], list[str]]
) -> None:
    with torch.autocast("cpu", dtype=dtype):
        as_plain(vae, 0)
        both(vae)
    assert len(lines()) == 1
    assert "autocast" in lines()[0]
    with torch.autocast("cpu", enabled=False):
        both(vae)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_type_of_weights_gives_its_own_type(vae: Any, dtype: torch.dtype) -> None:
    truth = both(copy.deepcopy(vae), dtype)
    plain = both(vae.to(dtype))
    handscroll.attach(vae)
    for one, other, true in zip(both(vae), plain, truth, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        errors = [(each.double() - true.double()).abs().mean().item() for each in (one, other)]
        assert errors[0] <= 1.1 * errors[1]


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_another_default_type_changes_nothing(vae: Any, default: torch.dtype) -> None:
    z, x = torch.randn(LATENT), torch.randn(PICTURE)
    plain = [vae.decode(z).sample, vae.encode(x).latent]
    handscroll.attach(vae)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        ours = [vae.decode(z).sample, vae.encode(x).latent]
    finally:
        torch.set_default_dtype(before)
    assert_alike(ours, plain)


def test_another_default_device_changes_nothing(vae: Any) -> None:
    z = torch.randn(LATENT)
    plain = vae.decode(z).sample
    handscroll.attach(vae)
    with torch.device("meta"):
        ours = vae.decode(z).sample
    assert_alike([ours], [plain])


def test_half_of_the_weights_in_another_type_is_left_to_the_module(vae: Any) -> None:
    vae.decoder.conv_out.double()
    z = torch.randn(LATENT)
    with pytest.raises(RuntimeError) as plain:
        vae.decode(z)
    handscroll.attach(vae)
    with pytest.raises(RuntimeError) as ours:
        vae.decode(z)
    assert str(ours.value) == str(plain.value)


def test_meta_weights_give_meta_results() -> None:
    with torch.device("meta"):
        vae = handscroll.attach(miniatures.make_autoencoder().eval().requires_grad_(False))
        out = vae.decode(torch.empty(LATENT)).sample
    assert out.is_meta
    assert out.shape == (2, 3, 96, 160)


# Layers


def hooked(output: Tensor) -> Tensor:
    return output * 1.5


def lora(linear: nn.Linear) -> nn.Module:
    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.down = linear, nn.Linear(linear.in_features, linear.out_features, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.down(x)

    return Added().requires_grad_(False)


def set_lora(vae: Any) -> None:
    for half, stages in ((vae.decoder, "up_blocks"), (vae.encoder, "down_blocks")):
        for stage in getattr(half, stages):
            for block in stage:
                if hasattr(block, "attn"):
                    block.attn.to_q = lora(block.attn.to_q)


class Halved(SanaMultiscaleAttnProcessor2_0):
    def __call__(self, attn: Any, hidden_states: Tensor) -> Tensor:
        return super().__call__(attn, hidden_states) / 2


def each_attention(vae: Any) -> Iterator[Any]:
    return (module for module in vae.modules() if hasattr(module, "processor"))


def set_processors(vae: Any) -> None:
    for attention in each_attention(vae):
        attention.processor = Halved()


def each_conv(vae: Any) -> list[nn.Conv2d]:
    return [each for each in vae.modules() if isinstance(each, nn.Conv2d) and each.kernel_size == (3, 3)]


def wrap_forward(conv: nn.Module) -> None:
    plain = conv.forward
    conv.forward = lambda x: plain(x) * 1.25


def convolve_in_circles(conv: Any) -> None:
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 0, 0), "circular"), weight, bias, conv.stride, (1, 0), groups=conv.groups)

    conv._conv_forward = forward


def replace_conv(half: Any, **options: Any) -> None:
    old = half.conv_out
    half.conv_out = nn.Conv2d(old.in_channels, old.out_channels, **options).requires_grad_(False)


def for_each(modules: Iterable[Any], change: Change) -> None:
    for module in list(modules):
        change(module)


def with_attribute(vae: Any, name: str) -> Iterator[Any]:
    return (module for module in vae.modules() if hasattr(module, name))


def pad_in_circles(conv: Any) -> None:
    conv.padding_mode, conv._reversed_padding_repeated_twice = "circular", [1] * 4


CHANGES: dict[str, Change] = {
    "forward hooks": lambda vae: for_each(
        each_conv(vae), lambda conv: conv.register_forward_hook(lambda _, given, out: hooked(out))
    ),
    "forward pre-hooks": lambda vae: for_each(
        each_conv(vae), lambda conv: conv.register_forward_pre_hook(lambda _, given: (hooked(given[0]),))
    ),
    "hooks on the halves": lambda vae: for_each(
        halves(vae), lambda half: half.register_forward_hook(lambda _, given, out: hooked(out))
    ),
    "hooks on stages": lambda vae: for_each(
        (vae.decoder.up_blocks[0], vae.encoder.down_blocks[0]),
        lambda stage: stage.register_forward_hook(lambda _, given, out: hooked(out)),
    ),
    "replaced forward": lambda vae: for_each(each_conv(vae), wrap_forward),
    "replaced part of a forward": lambda vae: for_each(
        (each for each in each_conv(vae) if each.stride == (1, 1)), convolve_in_circles
    ),
    "padding in circles": lambda vae: for_each(each_conv(vae), pad_in_circles),
    "dilation": lambda vae: for_each(
        halves(vae), lambda half: replace_conv(half, kernel_size=3, padding=2, dilation=2)
    ),
    "larger kernels": lambda vae: for_each(halves(vae), lambda half: replace_conv(half, kernel_size=5, padding=2)),
    "LoRA": set_lora,
    "another attention": set_processors,
    "biases of queries": lambda vae: for_each(
        each_attention(vae), lambda attention: setattr(attention, "to_q", with_bias(attention.to_q))
    ),
    "another activation": lambda vae: for_each(
        with_attribute(vae, "conv_depth"), lambda block: setattr(block, "nonlinearity", nn.GELU())
    ),
    "weight norm": lambda vae: for_each(each_conv(vae), nn.utils.parametrizations.weight_norm),
    "pruning": lambda vae: for_each(each_conv(vae), prune),
    "bilinear upsampling": lambda vae: for_each(
        with_attribute(vae, "repeats"), lambda block: setattr(block, "interpolation_mode", "bilinear")
    ),
    "a subclass of a layer": lambda vae: setattr(vae.decoder.conv_out, "__class__", Doubled),
    "compiled halves": lambda vae: for_each(
        ("decoder", "encoder"), lambda name: setattr(vae, name, torch.compile(getattr(vae, name), backend="eager"))
    ),
    "layers that are gone": lambda vae: setattr(
        vae.decoder.up_blocks[0], str(len(vae.decoder.up_blocks[0]) - 1), nn.Identity()
    ),
}


class Doubled(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def halves(vae: Any) -> tuple[Any, Any]:
    return vae.decoder, vae.encoder


def with_bias(linear: nn.Linear) -> nn.Linear:
    biased = nn.Linear(linear.in_features, linear.out_features).requires_grad_(False)
    biased.weight.copy_(linear.weight)
    return biased


def prune(conv: nn.Conv2d) -> None:
    prune_module.l1_unstructured(conv, "weight", 0.5)
    conv.requires_grad_(False)


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_put_around_or_in_place_of_layers_is_kept(
    vae: Any, change: str, lines: Callable[[], list[str]]
) -> None:
    with torch.no_grad():
        CHANGES[change](vae)
        vae.requires_grad_(False)
        as_plain(vae)
        both(vae)
    said = lines()
    assert 1 <= len(said) == len(set(said)) <= 2
    assert all("whole module is run" in line for line in said)


def test_memory_is_refused_where_the_whole_module_would_have_to_run(vae: Any) -> None:
    z = torch.randn(LATENT)
    handscroll.attach(vae, memory="300MiB")
    with pytest.raises(UsageError, match="gradients"):
        vae.decode(z.requires_grad_())
    with torch.autocast("cpu"), pytest.raises(UsageError, match="autocast"):
        vae.decode(z.detach())
    set_processors(vae)
    with pytest.raises(UsageError, match=r"decoder\.up_blocks\..*attn"):
        vae.decode(z.detach())
    handscroll.detach(vae)
    with pytest.raises(UsageError, match="memory cannot be kept"):
        handscroll.attach(vae, memory="300MiB")
    assert "_decode" not in vars(vae)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_batch_norms_in_training_mode_see_the_whole_batch(mode: str) -> None:
    torch.manual_seed(2)
    vae = as_if_trained(AutoencoderDC(**{**F32, **CASES["f32 with batch norm and relu"].config}))
    getattr(vae, mode)()
    other = copy.deepcopy(vae)
    z = torch.randn(2, 4, 3, 3)
    handscroll.attach(vae)
    assert_alike([vae.decode(z).sample], [other.decode(z).sample])
    for one, two in zip(vae.buffers(), other.buffers(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    "config",
    [
        {"decoder_norm_types": "layer_norm", "decoder_block_types": "EfficientViTBlock"},
        {"decoder_act_fns": "mish"},
        {"decoder_act_fns": "gelu", "decoder_conv_act_fn": "gelu"},
    ],
    ids=str,
)
def test_configurations_that_nobody_publishes(config: dict[str, Any]) -> None:
    torch.manual_seed(2)
    if config.get("decoder_norm_types") == "layer_norm":
        config = config | {"decoder_qkv_multiscales": ((3,),) * 6}
    vae = as_if_trained(AutoencoderDC(**{**F32, **config}))
    z = torch.randn(1, 4, 3, 4)
    try:
        plain = vae.decode(z).sample
    except RuntimeError as error:  # a configuration that diffusers makes and cannot run
        handscroll.attach(vae)
        with pytest.raises(RuntimeError, match=str(error)[:20].replace("(", ".").replace("[", ".")):
            vae.decode(z)
        return
    handscroll.attach(vae)
    assert_alike([vae.decode(z).sample], [plain])


@pytest.mark.parametrize("name", CASES)
def test_every_configuration_decodes_and_encodes_attached(name: str) -> None:
    vae = copy.deepcopy(steady_autoencoder(name, 3, 2))
    z = latent_of(vae, 3, 2)
    plain = vae.decode(z).sample
    latent = vae.encode(plain).latent
    handscroll.attach(vae)
    assert_alike([vae.decode(z).sample], [plain])
    ours = vae.encode(plain).latent
    assert (ours.shape, ours.dtype) == (latent.shape, latent.dtype)


# Inputs


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: x.repeat(1, 1, 1, 2)[..., ::2],
        lambda x: x[:1].expand(3, -1, -1, -1),
        lambda x: nn.Parameter(x, requires_grad=False),
    ],
    ids=["channels last", "transposed", "strided", "expanded", "a parameter"],
)
def test_inputs_of_every_layout(vae: Any, change: Callable[[Tensor], Tensor]) -> None:
    z, x = change(torch.randn(LATENT)), change(torch.randn(PICTURE))
    plain = [vae.decode(z).sample, vae.encode(x).latent]
    handscroll.attach(vae)
    assert_alike([vae.decode(z).sample, vae.encode(x).latent], plain)


def test_channels_last_weights(vae: Any) -> None:
    as_plain(vae.to(memory_format=torch.channels_last))


@pytest.mark.parametrize(
    "given",
    [
        torch.zeros(2, 32, 3, 5, dtype=torch.int64),
        torch.zeros(32, 3, 5),
        torch.zeros(0, 32, 3, 5),
        torch.zeros(1, 3, 4, 4),
    ],
    ids=["whole numbers", "no batch", "an empty batch", "other channels"],
)
def test_what_the_module_refuses_is_refused(vae: Any, given: Tensor) -> None:
    with pytest.raises((RuntimeError, ValueError)) as plain:
        vae.decode(given)
    handscroll.attach(vae)
    with pytest.raises(type(plain.value)) as ours:
        vae.decode(given)
    assert str(ours.value) == str(plain.value)


def test_results_as_tuples_and_one_by_one(vae: Any) -> None:
    z = torch.randn(LATENT)
    plain = vae.decode(z, return_dict=False)
    vae.enable_slicing()
    handscroll.attach(vae)
    ours = vae.decode(z, return_dict=False)
    assert isinstance(ours, tuple)
    assert_alike(list(ours), list(plain))


def test_tiling_encodes_sizes_that_only_it_can(vae: Any, lines: Callable[[], list[str]]) -> None:
    x = torch.randn(1, 3, 540, 960)
    handscroll.attach(vae)
    with pytest.raises(SizeError, match=r"960x540 .* multiples of 32"):
        vae.encode(x)
    vae.enable_tiling()
    ours = vae.encode(x).latent
    handscroll.detach(vae)
    assert torch.equal(ours, vae.encode(x).latent)
    assert ours.shape == (1, 32, 16, 30)
    assert len(lines()) == 1
    assert "tiling" in lines()[0]


def test_strided_first_layers_round_odd_sizes_up_as_the_module_does() -> None:
    torch.manual_seed(3)
    vae = as_if_trained(AutoencoderDC(**{**F32, **CASES["no layers in the first stage"].config}))
    x = torch.randn(1, 3, 63, 95)
    plain = vae.encode(x).latent
    handscroll.attach(vae)
    assert_alike([vae.encode(x).latent], [plain])


# The module as an object


def test_copies_are_attached_and_independent(vae: Any) -> None:
    handscroll.attach(vae, strip_rows=1)
    plain = both(vae)
    copied = copy.deepcopy(vae)
    with torch.no_grad():
        vae.decoder.conv_in.weight.mul_(2)
        vae.encoder.conv_in.weight.mul_(2)
    assert_alike(both(copied), plain, 0)
    del vae
    assert_alike(both(copied), plain, 0)
    handscroll.detach(copied)
    assert_alike(both(copied), plain)


def test_pickles_hold_the_settings_and_no_listener(vae: Any) -> None:
    plain = both(vae)
    handscroll.attach(vae, memory="300MiB", on_event=lambda event: None)
    again = pickle.loads(pickle.dumps(vae))
    assert_alike(both(again), plain)
    with pytest.raises(UsageError):
        again.decode(torch.randn(LATENT, requires_grad=True))


def test_an_autoencoder_is_freed_with_its_last_reference() -> None:
    owned = handscroll.attach(miniatures.make_autoencoder().eval().requires_grad_(False))
    owned.decode(torch.randn(LATENT))
    weight = weakref.ref(owned.decoder.conv_in.weight)
    gc.disable()
    try:
        del owned
        assert weight() is None
    finally:
        gc.enable()


def test_saving_writes_what_it_writes_by_itself(vae: Any, tmp_path: Path) -> None:
    vae.save_pretrained(tmp_path / "plain")
    handscroll.attach(vae)
    vae.save_pretrained(tmp_path / "attached")
    for file in (tmp_path / "plain").iterdir():
        assert file.read_bytes() == (tmp_path / "attached" / file.name).read_bytes()
    again = AutoencoderDC.from_pretrained(tmp_path / "attached").requires_grad_(False)
    handscroll.detach(vae)
    assert_alike(both(again), both(vae), 0)
    assert set(vae.state_dict()) == set(again.state_dict())


@pytest.mark.parametrize("attached", ["before", "after"])
def test_compiled_modules(vae: Any, attached: str) -> None:
    plain = both(vae)
    if attached == "before":
        handscroll.attach(vae)
    compiled = torch.compile(vae, backend="eager")
    if attached == "after":
        assert handscroll.attach(compiled) is compiled
    assert "_decode" in vars(vae)
    assert_alike(both(compiled), plain)
    x = torch.randn(PICTURE)
    whole = vae(x).sample
    assert_alike([compiled(x).sample], [whole])
    handscroll.detach(compiled)
    assert "_decode" not in vars(vae)


def test_the_callers_compile_of_decode_sees_the_whole_module(vae: Any, lines: Callable[[], list[str]]) -> None:
    z = torch.randn(LATENT)
    plain = vae.decode(z).sample
    handscroll.attach(vae)
    decode = torch.compile(lambda z: vae.decode(z).sample, backend="eager", fullgraph=True)
    assert_alike([decode(z)], [plain])
    assert_alike([decode(z)], [plain])
    assert len(lines()) == 1


def test_exported_and_traced_modules(vae: Any) -> None:
    z = torch.randn(1, 32, 2, 3)
    plain = vae.decode(z).sample
    handscroll.attach(vae)

    class Decode(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vae = vae

        def forward(self, z: Tensor) -> Tensor:
            return self.vae.decode(z).sample

    assert_alike([torch.export.export(Decode(), (z,)).module()(z)], [plain])


def test_wrappers_of_data_parallelism(vae: Any) -> None:
    wrapped = nn.DataParallel(vae)
    assert handscroll.attach(wrapped) is wrapped
    x = torch.randn(PICTURE)
    ours = wrapped(x).sample
    handscroll.detach(wrapped)
    assert_alike([ours], [vae(x).sample])


def test_ways_of_decoding_that_are_not_diffusers_own_are_not_replaced(vae: Any) -> None:
    class Own(AutoencoderDC):
        def _decode(self, z: Tensor) -> Tensor:
            return super()._decode(z) * 2

    with pytest.raises(UsageError, match="_decode of its own"):
        handscroll.attach(Own(**miniatures.AUTOENCODER))
    vae.__dict__["_encode"] = lambda x: x
    with pytest.raises(UsageError, match="_encode of its own"):
        handscroll.attach(vae)
    assert "_decode" not in vars(vae)


def test_weights_swapped_in_by_functional_call(vae: Any) -> None:
    z = torch.randn(LATENT)
    others = {name: value * 1.1 for name, value in vae.state_dict().items()}

    class Decode(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vae = vae

        def forward(self, z: Tensor) -> Tensor:
            return self.vae.decode(z).sample

    swapped = {f"vae.{name}": value for name, value in others.items()}
    plain = torch.func.functional_call(Decode(), swapped, (z,))
    handscroll.attach(vae)
    assert_alike([torch.func.functional_call(Decode(), swapped, (z,))], [plain])


def test_vmap_sees_the_whole_module(vae: Any) -> None:
    z = torch.randn(2, 1, 32, 2, 3)

    def decoded() -> Tensor:
        return torch.func.vmap(lambda each: vae.decode(each).sample)(z)

    plain = decoded()
    handscroll.attach(vae)
    assert torch.equal(decoded(), plain)
