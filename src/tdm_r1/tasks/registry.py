"""Tasks by name. Nothing heavy is imported here."""

from __future__ import annotations

from ..plugins import Registry

TASKS = Registry(
    "task.name",
    {
        "mini": "tdm_r1.mini.task:make_shapes",
        "mini_signs": "tdm_r1.mini.task:make_signs",
        "prompts": "tdm_r1.tasks.prompt_files:make",
        "geneval": "tdm_r1.tasks.geneval:make",
    },
)
WITHOUT_METRICS = ("prompts", "geneval")  # they measure nothing beside the reward
TAKES = {  # which settings beside its name each of them takes
    "mini": ("weights",),
    "mini_signs": (),
    "prompts": ("prompts", "eval_prompts"),
    "geneval": ("prompts", "weights"),
}
