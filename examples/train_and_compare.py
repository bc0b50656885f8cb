"""What `mlx-dpo demo` does, as a script: python examples/train_and_compare.py [MODEL [PAIRS]]

Trains, counts how many unseen pairs are ranked right before and after, and shows answers of both models. MODEL is a
folder or Hub name; without it SmolLM2-135M-Instruct is fetched. PAIRS is a folder with train.jsonl and test.jsonl;
without it the pairs that the package ships.
"""

import sys
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from mlx_dpo import (
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    compare,
    evaluate,
    fetch_demo_model,
    load_tuned,
    train,
)

model = ModelConfig(path=sys.argv[1] if len(sys.argv) > 1 else str(fetch_demo_model()))
pairs = Path(sys.argv[2] if len(sys.argv) > 2 else str(files("mlx_dpo") / "demo" / "data"))
config = RunConfig(
    model=model,
    data=DataConfig(path=str(pairs / "train.jsonl"), max_length=512),
    lora=LoraConfig(num_layers=8),
    optim=OptimConfig(learning_rate=1e-3),
    train=TrainConfig(output="runs/example", epochs=2),
)
unseen = replace(config.data, path=str(pairs / "test.jsonl"))

train(config)
tuned = replace(model, adapter=config.train.output)
before, after = evaluate(model, unseen), evaluate(tuned, unseen)
print(f"by log-prob per token {before['logps/accuracies_per_token']:.0%} → {after['logps/accuracies_per_token']:.0%}")
print(f"by the reward {after['rewards/accuracies']:.0%} of {after['rows']} unseen pairs ranked right")
for answers in compare(load_tuned(tuned), ["Who wrote Emma?", "How do I boil an egg?"], max_tokens=60):
    print(f"\n{answers.prompt}\n  before: {answers.base.text}\n  after:  {answers.tuned.text}")
