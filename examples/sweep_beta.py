"""Which β? python examples/sweep_beta.py MODEL DATA [β …]

Trains once for each β, on the same batches, and prints what the held-out rows say: a small β lets the model go far from
the reference, a large one holds it back. The reference's log-probs are computed in the first run and found on disk by
the others.
"""

import sys
from dataclasses import replace

from mlx_dpo import DataConfig, LossConfig, ModelConfig, RunConfig, TrainConfig, train

model, data, *betas = sys.argv[1:]
config = RunConfig(model=ModelConfig(path=model), data=DataConfig(path=data))

print("   β  accuracy  margin  KL a token")
for beta in map(float, betas or ("0.03", "0.1", "0.3")):
    run = replace(config, loss=LossConfig(beta=beta), train=TrainConfig(output=f"runs/beta-{beta:g}", save_every=1000))
    found = train(run).evaluations[-1]
    print(
        f"{beta:4g}  {found['rewards/accuracies']:8.1%}  {found['rewards/margins']:6.2f}  {found['kl/token']:10.4f}",
        flush=True,
    )
