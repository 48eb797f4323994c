#!/usr/bin/env bash
# The built-in model, from nothing to src/handscroll/builtin/tiny-landscape.
#
#   training/recipe.sh WORK [DEVICE]        DEVICE: auto (default), cpu, cuda
#   PRECISION=fp32 training/recipe.sh WORK  on a processor that is slow in bf16 (without AVX-512 bf16 or AMX)
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
processes=$(nproc) precision=${PRECISION:-bf16}
if [ "$device" = cpu ]; then
    # The autoencoder takes one core, so that the painters have the other.
    windows=8000 autoencoder_steps=10000 encoder_steps=7000 autoencoder_batch=8
    pictures=1 steps=17400 tokens=2048 workers=2
    pairs=1 growth_steps=7000
    scorer_steps=2000 jobs=2
else
    windows=24000 autoencoder_steps=12000 encoder_steps=7000 autoencoder_batch=32
    pictures=5 steps=16000 tokens=16384 workers=1
    pairs=4 growth_steps=8000
    scorer_steps=2500 jobs=8
fi

# 1. Windows of renders for the autoencoder. CPU: 3 minutes. CUDA machine: 1 minute.
python -m training.windows --work "$work" --count "$windows" --processes "$processes"

# 2. The autoencoder, from the linear solution: both halves together, then the decoder alone.
#    CPU: 3 hours. CUDA: 12 minutes. Step 3 may begin beside it once "encoder fixed" is printed.
python -m training.autoencoder --work "$work" --device "$device" --steps "$autoencoder_steps" \
    --encoder-steps "$encoder_steps" --batch "$autoencoder_batch" --rate 3e-4 --precision "$precision"

# 3. Captions and latents of every size. CPU: 25 minutes with both cores. CUDA machine: 6 minutes.
#    Step 4 reads what there is and looks for more every 100 steps, so the two may run side by side.
python -m training.latents --work "$work" --device "$device" --scale "$pictures" --processes "$processes"

# 4. The transformer and its text encoder. CPU: 4.5 hours with both cores. CUDA: 15 minutes.
python -m training.transformer --work "$work" --device "$device" --steps "$steps" --tokens "$tokens" --workers "$workers" \
    --precision "$precision"

# 5. The scorer, which learns from renders alone. CPU: 1 hour. CUDA: 3 minutes.
python -m training.scorer --work "$work" --device "$device" --steps "$scorer_steps" --jobs "$jobs" --processes "$processes"

# 6. What larger sizes begin from: smaller pictures, enlarged; and more of 512 rows, where pictures are composed. It goes
#    on from step 4, or where WORK has nothing of that from the folder that ships.
#    CPU: 10 minutes for the pairs and 75 for the steps, with both cores. CUDA: 15 minutes.
python -m training.export --work "$work"
python -m training.growth pairs --work "$work" --scale "$pairs" --processes "$processes"
python -m training.growth train --work "$work" --device "$device" --steps "$growth_steps" --tokens "$tokens" \
    --workers "$workers" --precision "$precision"

# 7. The folder that ships, what it is worth, and its gallery. CPU: 1 hour, a third of it for 300 prompts at 1024x1024.
python -m training.export --work "$work"
python -m training.evaluate --work "$work"
python -m training.gallery --work "$work"
