"""`trim_scope: model`: one threshold for the whole task vector, as in the TIES paper.

A pass over the weights counts how many entries of each tensor are among the largest of the model;
trimming each tensor to that many is trimming the model as one vector.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from agentcpm_jax.merge.inputs import MergeInput
from agentcpm_jax.merge.kernels.selection import keep_counts
from agentcpm_jax.merge.recipe import MergeRecipe
from agentcpm_jax.merge.resolve import TensorJob
from agentcpm_jax.types import UserError

PIECE = 1 << 20  # elements


def with_kept_counts(
    recipe: MergeRecipe, jobs: Sequence[TensorJob], models: Mapping[str, MergeInput]
) -> Sequence[TensorJob]:
    """The jobs with `keep` set where the recipe trims by model.

    Raises UserError if a model's density differs between tensors: one vector has one density.
    """
    if all(job.shared.get("trim_scope", "tensor") == "tensor" for job in jobs):
        return jobs
    kept = [_counts(jobs, models, i) for i in range(len(jobs[0].own))]
    return [
        dataclasses.replace(
            job,
            own=tuple({**own, "keep": kept[i][job.name]} for i, own in enumerate(job.own)),
        )
        for job in jobs
    ]


def _counts(
    jobs: Sequence[TensorJob], models: Mapping[str, MergeInput], index: int
) -> dict[str, int]:
    densities = {float(job.own[index]["density"]) for job in jobs}
    name = jobs[0].inputs[index][0]
    if len(densities) > 1:
        raise UserError(
            f"trim_scope model needs one density, {name} has {sorted(densities)}; "
            "give one number, or trim_scope: tensor"
        )
    size = sum(math.prod(job.info.shape) for job in jobs)
    density = min(max(densities.pop(), 0.0), 1.0)
    if density == 0.0:
        return {job.name: 0 for job in jobs}

    def pieces() -> Iterator[tuple[str, np.ndarray]]:
        for job in jobs:
            assert job.base is not None
            model, tensor = job.inputs[index]
            own, base = models[model].read(tensor), models[job.base[0]].read(job.base[1])
            flat, base_flat = own.reshape(-1), base.reshape(-1)
            for at in range(0, flat.size, PIECE):
                d = flat[at : at + PIECE].astype(np.float32)
                d -= base_flat[at : at + PIECE].astype(np.float32)
                yield job.name, np.abs(d, out=d)
            models[model].release(tensor)
            models[job.base[0]].release(job.base[1])

    return keep_counts(pieces, size, max(1, math.floor(density * size)))
