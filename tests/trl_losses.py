"""Make tests/trl_losses.json: what TRL's own code says to a few given numbers.

    pip download trl==0.11.4 --no-deps        # the last TRL whose PPO has functions for its losses
    TRL-ENV/bin/python tests/trl_losses.py trl-0.11.4-py3-none-any.whl > tests/trl_losses.json

TRL-ENV has a TRL of today, whose GRPOTrainer._compute_loss is called on a stub that gives it the
log-probs. PPOTrainer's compute_rewards, compute_advantages and loss are taken out of the old wheel
by name, since that TRL does not import beside a transformers of today. TRL has no REBEL.
"""

import ast
import collections
import json
import sys
import warnings
import zipfile
from dataclasses import fields
from types import SimpleNamespace
from unittest import mock

import torch

LENGTHS, LONGEST = (3, 6, 1, 4), 6
NAMES = ("logp", "old_logp", "ref_logp", "values", "old_values")


def given() -> dict:
    """The numbers, padded to (4, 6); ratios far enough from 1 for the clips to act."""
    chance = torch.Generator().manual_seed(0)
    base = -torch.rand(4, LONGEST, generator=chance, dtype=torch.float64) * 2
    told = {name: base + torch.randn(base.shape, generator=chance, dtype=torch.float64) * 0.3
            for name in NAMES}  # fmt: skip
    told["advantages"] = torch.randn(4, generator=chance, dtype=torch.float64)
    told["rewards"] = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    told = {name: x.round(decimals=6) for name, x in told.items()}
    return told | {"mask": (torch.arange(LONGEST) < torch.tensor(LENGTHS)[:, None]).double()}


def grpo(told: dict) -> dict:
    """GRPOTrainer._compute_loss with GRPOConfig's defaults but two; loss and gradient.

    As GRPO was published: beta = 0.04, and no ratio before the KL term.
    """
    from trl import GRPOConfig, GRPOTrainer

    defaults = {f.name: f.default for f in fields(GRPOConfig)}
    logp = told["logp"].clone().requires_grad_()
    changes = {"beta": 0.04, "use_bias_correction_kl": False, "steps_per_generation": 1}
    args = SimpleNamespace(**defaults | changes)
    accelerator = mock.MagicMock(num_processes=1)
    accelerator.reduce = lambda x, reduction: x
    accelerator.gather = lambda x: x
    stub = SimpleNamespace(
        args=args, accelerator=accelerator, model=SimpleNamespace(training=True),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        importance_sampling_level=args.importance_sampling_level, loss_type=args.loss_type,
        beta=args.beta, epsilon_low=args.epsilon, epsilon_high=args.epsilon, use_vllm=False,
        _entropy_bonus_enabled=False, current_gradient_accumulation_steps=1,
        _metrics={"train": collections.defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *a, **k: (logp, torch.zeros_like(logp), None),
    )  # fmt: skip
    ids = torch.zeros(4, LONGEST, dtype=torch.long)
    inputs = {"prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids}
    inputs |= {"completion_mask": told["mask"], "advantages": told["advantages"]}
    inputs |= {"old_per_token_logps": told["old_logp"], "ref_per_token_logps": told["ref_logp"]}
    inputs |= {"num_items_in_batch": told["mask"].sum()}
    loss = GRPOTrainer._compute_loss(stub, None, inputs)
    loss.backward()
    return {"loss_type": args.loss_type, "loss": loss.item(), "grad": logp.grad.tolist()}


def ppo(told: dict, wheel: str) -> dict:
    """The old PPOTrainer's rewards, advantages and losses with PPOConfig's defaults; gradients."""
    names = {"trl/core.py": ("masked_mean", "masked_var", "masked_whiten", "clip_by_value",
                             "entropy_from_logits", "flatten_dict"),
             "trl/trainer/ppo_trainer.py": ("compute_rewards", "_kl_penalty", "compute_advantages",
                                            "loss")}  # fmt: skip
    room = {"torch": torch, "F": torch.nn.functional, "warnings": warnings}
    room |= {"Optional": SimpleNamespace, "Dict": dict, "Mapping": dict}
    with zipfile.ZipFile(wheel) as archive:
        for path, wanted in names.items():
            for node in ast.walk(ast.parse(archive.read(path))):
                if isinstance(node, ast.FunctionDef) and node.name in wanted:
                    node.returns, node.decorator_list = None, []
                    for argument in node.args.args:
                        argument.annotation = None
                    exec(compile(ast.Module([node], []), path, "exec"), room)
    config = {"whiten_rewards": False, "gamma": 1.0, "lam": 0.95, "cliprange": 0.2}
    config |= {"cliprange_value": 0.2, "vf_coef": 1.0, "ratio_threshold": 10.0, "kl_penalty": "kl"}
    stub = SimpleNamespace(config=SimpleNamespace(**config), kl_ctl=SimpleNamespace(value=0.05))
    stub._kl_penalty = lambda *a: room["_kl_penalty"](stub, *a)
    mask, masked = told["mask"], {name: told[name] * told["mask"] for name in NAMES}
    pairs = (told["rewards"], told["old_logp"], told["ref_logp"], mask.long())
    rewards, _, _ = room["compute_rewards"](stub, *pairs)
    old_values, white, returns = room["compute_advantages"](
        stub, masked["old_values"], rewards, mask
    )
    logp, values = (told[name].clone().requires_grad_() for name in ("logp", "values"))
    logits = torch.zeros(4, LONGEST, 2, dtype=torch.float64)
    options = (told["old_logp"], old_values, logits, values, logp, mask, white, returns)
    policy, value, _ = room["loss"](stub, *options)
    (policy + value).backward()
    return {"rewards": rewards.tolist(), "whitened": white.tolist(), "returns": returns.tolist(),
            "policy_loss": policy.item(), "value_loss": value.item(),
            "policy_grad": logp.grad.tolist(), "value_grad": values.grad.tolist()}  # fmt: skip


def main() -> None:
    """Print the fixture."""
    import transformers
    import trl
    from trl.trainer.utils import nanstd

    told, wheel = given(), sys.argv[1]
    rewards = torch.tensor([[1.0, 0, 0, 1, 0, 0, 0, 0], [1.0] * 8, [0, 1, 0.5, 2, -1, 3, 1, 1]])
    groups = (rewards - rewards.mean(1, True)) / (nanstd(rewards, dim=1, keepdim=True) + 1e-4)
    versions = {"grpo": trl.__version__, "ppo": wheel.split("/")[-1].split("-")[1]}
    fixture = {"command": [line.strip() for line in __doc__.splitlines()[2:4]], "trl": versions}
    fixture |= {"torch": torch.__version__, "transformers": transformers.__version__}
    fixture |= {"lengths": LENGTHS, "given": {name: x.tolist() for name, x in told.items()}}
    fixture |= {"groups": {"rewards": rewards.tolist(), "advantages": groups.tolist()}}
    fixture |= {"grpo": grpo(told), "ppo": ppo(told, wheel)}
    print("{", ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in fixture.items()), "}")


if __name__ == "__main__":
    main()
