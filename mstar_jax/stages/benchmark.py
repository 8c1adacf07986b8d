"""benchmark: what policies answer on the benchmarks of `config.benchmarks`."""

import functools
from collections.abc import Sequence

from mstar_jax.evaluate import evaluation
from mstar_jax.inference.score import Scorer
from mstar_jax.stages.policy import Policy
from mstar_jax.stages.run import Run
from mstar_jax.structs import Model


def benchmark(run: Run, policies: Sequence[Policy], reward: Scorer | None) -> None:
    """Asks policies the benchmarks and writes the table; if samples are drawn, the reward model votes.

    Args:
      run: see `Run`.
      policies: the first is what the others are compared with. One at a time is in memory.
      reward: see above.
    """
    different = {policy.stage.name: policy for policy in policies}
    for policy in policies:
        policy.release()
    results = {}
    for name, policy in different.items():
        candidate = evaluation.Candidate(name, functools.partial(_params, policy), {"policy": name})
        results[name] = evaluation.evaluate(run, run.benchmarks, candidate, reward)
        policy.release()
        evaluation.write_table(run.benchmarks, results)


def _params(policy: Policy) -> Model:
    return policy.params
