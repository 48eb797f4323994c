"""Say whether two versions of handscroll make the same pictures, byte for byte.

    python bench/same_pictures.py                               # this source's digests, as JSON
    python bench/same_pictures.py --against ../older            # and whether that checkout makes the same
    python bench/same_pictures.py --against digests.json        # or what it printed, kept from an earlier run

Some twenty requests: sizes, budgets, precisions, formats, growth, a run that is interrupted and goes on, decoding a
kept latent, and `attach`. Each runs in a process of its own, on the built-in model and on miniatures with random
weights. Leaves with exit code 1 where a picture differs. Takes a few minutes a version on two cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROMPT = "snowy mountains at dusk, a red sun"

# Name of the request -> the lines that are run, one after another, in an empty folder. `handscroll` is this source's.
COMMANDS: dict[str, tuple[str, ...]] = {
    "png": ("generate PROMPT --seed 1 --size 512 -o a.png",),
    "jpeg, another ratio": ("generate PROMPT --seed 2 --size 640x352 --quality 80 -o a.jpg",),
    "webp, sides no multiples of 32": ("generate PROMPT --seed 3 --size 500x333 -o a.webp",),
    "pyramidal tiff": ("generate PROMPT --seed 4 --size 512x768 -o a.tif",),
    "deep zoom": ("generate PROMPT --seed 5 --size 768x512 -o a.dzi",),
    "two pictures": ("generate PROMPT --seed 6 --size 256 --count 2 -o a.png",),
    "negative, guidance, steps": (
        "generate PROMPT --seed 7 --size 384 --negative clouds --guidance 3 --steps 9 -o a.png",
    ),
    "no guidance": ("generate PROMPT --seed 8 --size 384 --guidance 1 -o a.png",),
    "bf16": ("generate PROMPT --seed 9 --size 512 --precision bf16 -o a.png",),
    "grows": ("generate PROMPT --seed 10 --size 1024 -o a.png",),
    "grows within a budget": ("generate PROMPT --seed 10 --size 1024 --memory 760MiB -o a.png",),
    "grows twice, in bf16": ("generate PROMPT --seed 11 --size 1536x1088 --compose 384 --precision bf16 -o a.png",),
    "does not grow": ("generate PROMPT --seed 12 --size 1024 --compose off --steps 6 -o a.png",),
    "a budget, low strips": ("generate PROMPT --seed 13 --size 640 --memory 720MiB --strip-rows 1 -o a.png",),
    "whole": ("generate PROMPT --seed 14 --size 512 --decode whole -o a.png",),
    "tiled": ("generate PROMPT --seed 15 --size 768 --compose off --steps 4 --decode tiled -o a.png",),
    "patch": ("generate PROMPT --seed 16 --size 512 --decode patch --patches 3 -o a.png",),
    "a kept latent, decoded again": (
        "generate PROMPT --seed 17 --size 512x320 --save-latent a.safetensors -o a.png",
        "decode a.safetensors --memory 720MiB -o b.png",
        "decode a.safetensors --precision bf16 --strip-rows 3 -o c.jpg",
    ),
    "few steps, another checkpoint": ("generate PROMPT --model mini-sprint --seed 18 --size 128x96 -o a.png",),
    "query and key norms, fp16": (
        "generate PROMPT --model mini-normed --seed 19 --size 160 --steps 4 --precision fp16 -o a.png",
    ),
}
# Likewise, in Python.
SCRIPTS: dict[str, str] = {
    "interrupted between latent and picture, and resumed": """
        import subprocess, sys
        from pathlib import Path
        import handscroll
        def stop(event):
            if event.stage == "decode":
                raise KeyboardInterrupt
        request = handscroll.Request(PROMPT, seed=20, width=512, height=512)
        try:
            handscroll.generate(request, Path("a.png"), on_event=stop)
        except KeyboardInterrupt:
            pass
        subprocess.run([sys.executable, "-m", "handscroll", "resume", "a.png", "-q"], check=True)
    """,
    "the class": """
        import handscroll
        scroll = handscroll.Handscroll.from_pretrained("tiny-landscape")
        for seed, compose in ((21, None), (22, 256)):
            scroll(PROMPT, width=512, height=544, seed=seed, compose=compose).save(f"{seed}.png")
    """,
    "attach": """
        import numpy, torch, handscroll
        from diffusers import AutoencoderDC
        from pathlib import Path
        folder = Path(handscroll.__file__).parent / "builtin" / "tiny-landscape" / "vae"
        for dtype in (torch.float32, torch.bfloat16):
            autoencoder = AutoencoderDC.from_pretrained(folder, torch_dtype=dtype)
            generator = torch.Generator().manual_seed(23)
            latent = torch.randn(2, 32, 13, 9, generator=generator).to(dtype)
            for number, options in enumerate(({}, {"strip_rows": 2}, {"memory": "200MiB"})):
                handscroll.attach(autoencoder, **options)
                with torch.no_grad():
                    picture = autoencoder.decode(latent).sample
                    again = autoencoder.encode(picture).latent
                name = f"{str(dtype).split('.')[1]}-{number}"
                numpy.save(f"decoded-{name}.npy", picture.float().numpy())
                numpy.save(f"encoded-{name}.npy", again.float().numpy())
    """,
}
MINIATURES = {"mini-sprint": "sana-sprint-0.6b", "mini-normed": "sana-1.5-1.6b"}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--against", type=Path, metavar="CHECKOUT", help="another checkout, or a JSON file that this printed"
    )
    parser.add_argument("--only", metavar="TEXT", help="only requests whose name holds it")
    arguments = parser.parse_args(argv)
    names = [name for name in (*COMMANDS, *SCRIPTS) if arguments.only is None or arguments.only in name]
    known = json.loads(arguments.against.read_text()) if arguments.against and arguments.against.is_file() else None
    different = 0
    found = {}
    for name in names:
        found[name] = digests(name, ROOT)
        if arguments.against is None:
            continue
        same = found[name] == (digests(name, arguments.against) if known is None else known.get(name))
        different += not same
        print(f"{'same' if same else 'DIFFERENT':<10}{name}", file=sys.stderr, flush=True)
    print(json.dumps(found, indent=1))
    return 1 if different else 0


def digests(name: str, checkout: Path) -> dict[str, str]:
    """The sha256 of every file that a request leaves behind, by its path."""
    environment = {"OMP_NUM_THREADS": "2", **os.environ, "PYTHONPATH": str(checkout.resolve() / "src")}
    with tempfile.TemporaryDirectory() as made:
        folder, cache = Path(made) / "work", Path(made) / "cache"
        folder.mkdir()
        environment["HANDSCROLL_CACHE"] = str(cache)

        def run(*arguments: str) -> None:
            done = subprocess.run(
                [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
            )
            if done.returncode:
                raise SystemExit(f"{name}: {done.stderr.strip()}")

        for miniature, model in MINIATURES.items():
            if any(miniature in line for line in COMMANDS.get(name, ())):
                script = str(checkout.resolve() / "bench" / "make_checkpoint.py")
                run(script, str(folder / miniature), "--model", model, "--miniature")
        for line in COMMANDS.get(name, ()):
            arguments = [PROMPT if word == "PROMPT" else word for word in line.split()]
            run("-m", "handscroll", *arguments, "--quiet")
        if name in SCRIPTS:
            lines = "\n".join(line.removeprefix(" " * 8) for line in SCRIPTS[name].splitlines())
            run("-c", f"PROMPT = {PROMPT!r}\n{lines}")
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files
            if path.relative_to(folder).parts[0] not in MINIATURES
        }


if __name__ == "__main__":
    sys.exit(main())
