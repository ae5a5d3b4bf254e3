"""A training step of `examples/gpt.py` as GPT-2 is large: what share of it is the optimizer's?"""

import dataclasses
import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import record

from device.session import Session, compile_all, timed

OPTIMIZERS = ("adamw", "muon", "normuon", "trion")
BATCHES = (128, 64, 32, 16, 8, 4)


def run(session: Session) -> None:
    """Steps with gradients alone and with each optimizer, in the largest batch that fits."""
    sys.path.insert(0, str(record.ROOT / "examples"))
    import gpt  # the model and its optimizers; neither tyro nor grain is needed for that

    config = gpt.Config(width=768, layers=12, heads=12, context=1024, dtype="bfloat16")
    if session.smoke:
        config = dataclasses.replace(config, width=32, layers=1, heads=2, context=32)
    for batch in (2,) if session.smoke else BATCHES:
        if _measure(session, gpt, dataclasses.replace(config, batch=batch)):
            return


def _measure(session: Session, gpt: Any, config: Any) -> bool:
    """Whether the batch fits into memory."""
    shape = (config.batch, config.context + 1)
    tokens = jax.random.randint(jax.random.key(0), shape, 0, 256).astype(jnp.uint8)
    graphdef, state = gpt.init_state(config)

    def gradients(params: Any, tokens: jax.Array) -> Any:
        return jax.value_and_grad(gpt.loss_of)(params, graphdef, tokens)

    arguments = (state.params, tokens)
    compiled = compile_all({"gradients": (gradients, arguments)}, session)["gradients"].call
    try:
        jax.block_until_ready(compiled(*arguments))
    except jax.errors.JaxRuntimeError as error:
        session.row(batch=config.batch, does_not_fit=str(error).splitlines()[0][:100])
        return False
    call = functools.partial(compiled, *arguments)
    alone = timed({"gradients": call}, smoke=session.smoke)["gradients"].median
    tokens_a_second = config.batch * config.context / alone
    session.row(batch=config.batch, step="gradients alone", ms=1e3 * alone, tokens=tokens_a_second)
    for name in session.each(OPTIMIZERS):
        with session.reported(step=name):
            chosen = dataclasses.replace(config, optimizer=name, learning_rate=1e-3)
            _, state = gpt.init_state(chosen)
            train_step = gpt.make_train_step(chosen, graphdef, state, tokens)

            def run_step(train_step: Any = train_step) -> Any:
                nonlocal state
                state, loss = train_step(state, tokens)
                return loss

            seconds = timed({name: run_step}, smoke=session.smoke)[name].median
            session.row(
                batch=config.batch,
                step=name,
                ms=1e3 * seconds,
                share_of_optimizer=max(0.0, 1 - alone / seconds),
                tokens=config.batch * config.context / seconds,
            )
    return True
