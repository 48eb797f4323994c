#!/usr/bin/env bash
# The built-in model, from nothing to src/handscroll/builtin/tiny-landscape.
#
#   training/recipe.sh WORK [DEVICE]        DEVICE: auto (default), cpu, cuda
#
# Every step can be interrupted and run again: pictures already painted stay, trainings go on from their last checkpoint.
# The same commands run on both kinds of machine; a GPU only gets larger batches and more steps.
# Durations are for 2 CPU cores with nothing else on them, and an estimate for one recent CUDA GPU with 16 cores.
set -euo pipefail

work=${1:?usage: training/recipe.sh WORK [DEVICE]}
device=${2:-auto}
cd "$(dirname "$0")/.."

if [ "$device" = auto ]; then
    device=$(python -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')
fi
if [ "$device" = cpu ]; then
    pictures=1 autoencoder_steps=4000 autoencoder_batch=8 steps=8000 tokens=1024 workers=$(nproc)
else
    pictures=8 autoencoder_steps=40000 autoencoder_batch=32 steps=60000 tokens=16384 workers=1
fi
processes=$(nproc)

# 1. Windows of renders for the autoencoder. CPU: 1 minute.
python -m training.windows --work "$work" --processes "$processes"

# 2. The autoencoder, from the linear solution, whose encoder it keeps. CPU: 20 minutes. CUDA: 20 minutes.
#    Nothing below needs more of it than the encoder, which is fixed at once; it may run beside steps 3 and 4.
python -m training.autoencoder --work "$work" --device "$device" \
    --steps "$autoencoder_steps" --batch "$autoencoder_batch" --encoder-steps 0

# 3. Captions and latents of every size. CPU: 15 minutes with both cores. CUDA machine: 15 minutes.
python -m training.latents --work "$work" --device "$device" --scale "$pictures" --processes "$processes"

# 4. The transformer and its text encoder. CPU: 90 minutes. CUDA: 1 hour.
python -m training.transformer --work "$work" --device "$device" --steps "$steps" --tokens "$tokens" --workers "$workers"

# 5. The folder that ships, and what it is worth. CPU: 10 minutes.
python -m training.export --work "$work"
python -m training.evaluate --work "$work"
