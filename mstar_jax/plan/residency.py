"""What lies on a device in each stage of a run, beside the programs' own arrays.

Between two trainings a policy's TrainState stays on the devices. The reward model and the weights for
sampling are arguments of the programs that use them, and are gone with the pass:

    stage      program            beside it
    train      the train step     nothing: its argument is the only TrainState
    sample     prefill, decoding  the policy's parameters, and Adam's moments without train.offload_optimizer
    score      the scores         the same
"""

from mstar_jax.plan.programs import Programs, own_bytes


def beside(programs: Programs, kind: str) -> tuple[int, int]:
    """(parameters, moments): bytes on a device beside the programs of a kind."""
    if kind.startswith("train"):
        return 0, 0
    state = programs.train_state()
    moments = 0 if programs.config.train.offload_optimizer else own_bytes(state.opt_state)
    return own_bytes(state.params), moments
