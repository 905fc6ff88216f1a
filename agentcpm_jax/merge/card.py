"""The model card of a merge: the recipe to repeat it, and what exactly went in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from agentcpm_jax.merge.recipe import COMPAT, MergeRecipe
from agentcpm_jax.merge.staging import digest


def model_card(
    recipe: MergeRecipe,
    seed: int,
    hashes: Mapping[str, Mapping[str, str]],
    notes: Sequence[str],
) -> str:
    """README.md. `hashes` identify the content of every input's files, by model and file."""
    rows = [
        f"| {model} | {file} | `{content}` |"
        for model, files in hashes.items()
        for file, content in files.items()
    ]
    how = f"as {COMPAT} calculates" if recipe.compat else "in float32, rounded once"
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "tags:",
            "- merge",
            "---",
            "# Merged model",
            "",
            f"Method `{recipe.merge_method}`, {how}, seed {seed}.",
            "",
            "```yaml",
            recipe.to_yaml().rstrip(),
            "```",
            "",
            f"SHA-256 of the recipe: `{digest(dict(recipe.raw))}`",
            "",
            *(f"- {note}" for note in notes),
            *([""] if notes else []),
            "| input | file | content |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )
