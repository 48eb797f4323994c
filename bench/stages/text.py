"""One prompt through Gemma-2: from the files, which are read first, to the embeddings that the transformer gets.

whole       transformers' Gemma2Model loaded whole, and SanaPipeline.encode_prompt of diffusers: padded
compiled    the same under torch.compile; its weights are loaded before, which is not counted
rows        handscroll: layer by layer from the file, without padding

Memory is the whole process's. The weights are random, of Gemma-2-2b's shape. Their tokenizer makes a token of each
byte, so the instruction before the prompt is cut to about as many tokens as Gemma's makes of it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import on_meta
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.models.text_encoder import TextEncoderSpec
from handscroll.runtime.modules import load_tokenizer
from handscroll.runtime.text import encode_prompt
from handscroll.runtime.text_encoder import open_text_encoder
from make_checkpoint import COMPONENTS, Noise, empty_module, make_scheduler, shapes, write_checkpoint
from stages import Ready, Size, Stage

INSTRUCTION_TOKENS, PROMPT_TOKENS, PADDED_TOKENS = 256, 64, 300
INSTRUCTION = ("Write down what is to be seen. " * 12)[: INSTRUCTION_TOKENS - 1]  # <bos> is a token too
PROMPT = ("a quiet lake at dusk, mountains behind it, " * 2)[:PROMPT_TOKENS]
ROW = "sana-1.6b"


class Text(Stage):
    modes = ("whole", "compiled", "rows")
    limit = "matrix"
    of_process = True
    has_size = False

    @property
    def spec(self) -> TextEncoderSpec:
        _, _, spec = shapes(ROW, miniature=self.settings.miniature)
        return spec if self.settings.layers is None else replace(spec, num_hidden_layers=self.settings.layers)

    @property
    def model_name(self) -> str:
        return f"gemma-2-2b, {self.spec.num_hidden_layers} layers{', miniature' if self.settings.miniature else ''}"

    def write_files(self, folder: Path) -> None:
        transformer, autoencoder, _ = shapes(ROW, miniature=True)
        transformer = replace(transformer, caption_channels=self.spec.hidden_size)
        parts = (transformer, autoencoder, self.spec)
        list(write_checkpoint(folder, parts, make_scheduler(ROW), dtype=self.settings.precision, noise=Noise(0)))

    def ready(self, mode: str, size: Size, compared: bool, scratch: Path) -> Ready:
        spec = CheckpointSpec.from_folder(self.settings.folder)
        _read(spec.folder / "text_encoder" / f"{COMPONENTS['text_encoder']}*.safetensors")
        tokenizer = load_tokenizer(spec)
        if mode == "rows":

            def stream(prompt: str = PROMPT) -> Tensor:
                encoder, stream = open_text_encoder(spec, dtype=self.settings.dtype, device=self.settings.device)
                with torch.inference_mode():
                    text = encode_prompt(spec, encoder, tokenizer, prompt, INSTRUCTION)
                stream.close()
                return text.embeddings

            return Ready(stream, lambda: stream("a"))
        if mode == "compiled":
            encoder = self.load()
            encoder.compile(dynamic=False)
            return Ready(lambda: self.encode(encoder, tokenizer), lambda: None)
        return Ready(lambda: self.encode(self.load(), tokenizer), lambda: None)

    def load(self) -> Any:
        from transformers import Gemma2Model

        folder = Path(self.settings.folder) / "text_encoder"
        return Gemma2Model.from_pretrained(folder, dtype=self.settings.dtype).to(self.settings.device).eval()

    def encode(self, encoder: Any, tokenizer: Any) -> Tensor:
        """As the pipeline does it; of its result, the positions that are no padding."""
        from diffusers import SanaPipeline

        pipeline: Any = SanaPipeline(tokenizer, encoder, None, None, None)
        with torch.inference_mode():
            embeddings, mask, _, _ = pipeline.encode_prompt(
                PROMPT,
                do_classifier_free_guidance=False,
                device=torch.device(self.settings.device),
                max_sequence_length=PADDED_TOKENS,
                complex_human_instruction=[INSTRUCTION],
            )
        return embeddings[:, mask[0].bool()]

    def flop(self, size: Size) -> int:
        tokens = INSTRUCTION_TOKENS + PADDED_TOKENS - 2
        with torch.device("meta"):
            model = empty_module(self.spec).eval()
            ids = torch.zeros(1, tokens, dtype=torch.int64)
            mask = torch.zeros(1, 1, tokens, tokens)  # given, since making one looks at values
        masks = {"full_attention": mask, "sliding_attention": mask}
        return on_meta.flop_of(lambda: model(input_ids=ids, attention_mask=masks, use_cache=False))

    def needed_bytes(self, mode: str, size: Size) -> int | None:
        return None if mode == "rows" else self.spec.parameter_count * self.settings.dtype.itemsize


def _read(pattern: Path) -> None:
    """So that no way finds its files on the disk and the next in memory."""
    for file in pattern.parent.glob(pattern.name):
        with file.open("rb", buffering=0) as stream:
            while stream.read(2**24):
                pass


STAGE = Text
