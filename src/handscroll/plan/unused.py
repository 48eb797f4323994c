"""What a request asks for and its job does not use, so that nothing is dropped without a word."""

from __future__ import annotations

from collections.abc import Iterator

from handscroll.models.checkpoint import CheckpointSpec
from handscroll.plan.inputs import TextRead
from handscroll.plan.plan import Plan
from handscroll.plan.precision import split
from handscroll.request import Request


def unused(request: Request, spec: CheckpointSpec, plan: Plan) -> tuple[str, ...]:
    """One line for the user for each thing that was asked for and is not used, or only in part.

    The plan is the request's own. `plan.prompt_read` is None where no prompt is read, as when a latent is decoded.
    """
    return (*_of_sampling(request, spec, plan), *_of_decoding(request))


def _of_sampling(request: Request, spec: CheckpointSpec, plan: Plan) -> Iterator[str]:
    if plan.prompt_read is not None and plan.prompt_read.is_cut:
        yield _cut("prompt", plan.prompt_read)
    if plan.negative_read is not None and plan.negative_read.is_cut:
        yield _cut("negative prompt", plan.negative_read)
    if request.negative.strip() and not uses_negative(spec, plan):
        yield (
            f"the negative prompt is not used: at guidance {plan.guidance:g} there is no second forward, which is what "
            "reads it; a guidance above 1 makes one"
        )
    used = guidance_used(spec, plan)
    if request.guidance is not None and used is None:
        yield f"guidance {request.guidance:g} is not used: {spec.name} takes none"
    elif request.guidance is not None and used != request.guidance:
        yield f"guidance {request.guidance:g} acts as {used:g}: only above 1 is there a second forward to weigh against"
    if request.compose_px and plan.smaller is None:
        steps = f"{plan.steps} step{'s' * (plan.steps != 1)}"
        size = f"{plan.width}x{plan.height}"
        yield f"compose {request.compose_px} is not used: {size} in {steps} does not grow from there"
    if spec.compose_px and request.compose_px is None and not spec.scheduler.is_flow:
        yield "pictures do not grow here, as the model's handscroll.json asks, because its scheduler has no flow sigmas"


def _of_decoding(request: Request) -> Iterator[str]:
    if request.patches is not None and request.decode != "patch":
        yield f"patches {request.patches} is not used: it is for --decode patch, not --decode {request.decode}"
    if request.strip_rows is not None and request.decode != "rows":
        yield f"strip rows {request.strip_rows} is not used: it is for --decode rows, not --decode {request.decode}"
    if split(request.precision)[1] == "fp16":
        yield "fp16 is for the transformer alone: text encoder and autoencoder run in bf16, whose range they need"


def uses_negative(spec: CheckpointSpec, plan: Plan) -> bool:
    """Whether each step has a second forward, which reads the negative prompt."""
    return plan.guided and not spec.is_sprint


def uses_guidance(spec: CheckpointSpec) -> bool:
    """Whether guidance changes the picture: by a second forward, or as an input of a few-step model."""
    return not spec.is_sprint or spec.transformer.guidance_embeds


def guidance_used(spec: CheckpointSpec, plan: Plan) -> float | None:
    """The guidance that the picture is made with; None where it has no effect.

    Between 0, which says off, and 1 there is no second forward, and it is 1.
    """
    if not uses_guidance(spec):
        return None
    return 1.0 if 0 < plan.guidance < 1 and not spec.is_sprint else plan.guidance


def _cut(what: str, text: TextRead) -> str:
    upto = f', up to "{text.ends}"' if text.ends else ""
    return f"the {what} is longer than the model reads: of {text.tokens} tokens the first {text.read} are read{upto}"
