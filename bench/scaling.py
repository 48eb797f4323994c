"""Print the tables of docs/scaling.md: what 1 to 64 devices would need for a picture, by the plan's closed forms.

    python bench/scaling.py

No device is needed: a step's and a decode's work divided as the ranks divide it, at the rates that one device was
measured at, and what ranks send over a link. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import dataclasses
import json

from handscroll.models.known import known_specs
from handscroll.plan.communication import Link, Most, keys_and_values_bytes, most_of_step, most_of_sweeps
from handscroll.plan.decode import decode_stages
from handscroll.plan.decoder_shape import DecoderShape
from handscroll.plan.denoise import Sampling
from handscroll.plan.inputs import Hardware

MODEL, TOKENS, STEPS = "sana-1.6b-4k", (300, 1), 20
# One H100, bf16, Triton, 4096x4096: docs/performance.md.
STEP_S, DECODE_S = 0.20, 0.44
LINKS = {
    "NVLink": Link(450e9, 10e-6),
    "400 Gbit/s": Link(50e9, 20e-6),
    "100 Gbit/s": Link(12.5e9, 30e-6),
}
SIDES, RANKS = (4096, 16384, 32768), (1, 2, 4, 8, 16, 32, 64)


def main() -> None:
    spec = known_specs()[MODEL]
    rates = (_step(4096, 1)[0] / STEP_S, _decoding(4096, 1)[0] / DECODE_S)
    found = []
    for side in SIDES:
        print(f"\n{side}x{side}: seconds of {STEPS} steps and the decode, and efficiency, by the link\n")
        print("| devices | a rank's rows | sent a step | messages a step | " + " | ".join(LINKS) + " |")
        print("|---|---|---|---|" + "---|" * len(LINKS))
        alone = None
        for ranks in RANKS:
            if ranks > side // 32:
                continue
            step_flops, step = _step(side, ranks)
            decode_flops, decoded = _decoding(side, ranks)
            cells = []
            for link in LINKS.values():
                seconds = STEPS * (step_flops / rates[0] + step.seconds(link)) + decode_flops / rates[1]
                seconds += decoded.seconds(link)
                alone = seconds if ranks == 1 else alone
                assert alone is not None
                cells.append(f"{seconds:.2f} s, {alone / ranks / seconds:.0%}")
                found.append({"side": side, "ranks": ranks, "link": dataclasses.asdict(link), "seconds": seconds})
            rows = side // 32 * 2 / ranks
            print(f"| {ranks} | {rows:g} | {step.bytes / 1e6:.0f} MB | {step.messages} | " + " | ".join(cells) + " |")
    job = Sampling(128, 128, max(TOKENS), 1, 2, "bf16")
    print(f"\nKeys and values of a step at 4096x4096: {keys_and_values_bytes(spec.transformer, job) / 1e6:.0f} MB.")
    print(json.dumps(found))


def _step(side: int, ranks: int) -> Most:
    job = Sampling(side // 32, side // 32, max(TOKENS), 1, 2, "bf16", ranks=ranks)
    return most_of_step(known_specs()[MODEL].transformer, job, TOKENS)


def _decoding(side: int, ranks: int) -> Most:
    shape = DecoderShape(known_specs()[MODEL].autoencoder, side // 32, side // 32, 2, ranks=ranks)
    return most_of_sweeps(shape, next(iter(decode_stages(shape, "bf16", Hardware("cuda:0"), None))))


if __name__ == "__main__":
    main()
