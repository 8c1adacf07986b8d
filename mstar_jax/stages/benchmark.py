"""benchmark: what policies answer on the benchmarks of `config.benchmarks`."""

import functools
import logging
from collections.abc import Sequence

from mstar_jax.evaluate import evaluation
from mstar_jax.inference.score import Scorer
from mstar_jax.stages.policy import Policy
from mstar_jax.stages.run import Run
from mstar_jax.structs import Model, Stage

log = logging.getLogger(__name__)


def benchmark(run: Run, policies: Sequence[Policy], reward: Scorer | None) -> None:
    """Asks the reward model its own benchmark, then policies theirs, and writes the tables. If samples are
    drawn, the reward model votes.

    Args:
      run: see `Run`.
      policies: the first is what the others are compared with. One at a time is in memory.
      reward: see above.
    """
    different = {policy.stage.name: policy for policy in policies}
    for policy in policies:
        policy.release()
    if run.benchmarks.solutions and reward is None:
        log.warning("no reward model: nothing is asked of visualprocessbench")
    elif run.benchmarks.solutions and reward:
        evaluation.judge_steps(run, run.benchmarks, reward, Stage.reward_model.name)
    results = {}
    for name, policy in different.items():
        candidate = evaluation.Candidate(name, functools.partial(_params, policy), {"policy": name})
        results[name] = evaluation.evaluate(run, run.benchmarks, candidate, reward)
        policy.release()
        evaluation.write_table(run.benchmarks, results)


def _params(policy: Policy) -> Model:
    return policy.params
