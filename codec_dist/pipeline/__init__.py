"""The flow of a run: its folder, the order and fingerprints of stages, and their work put onto Ray."""

from codec_dist.pipeline.errors import PipelineError
from codec_dist.pipeline.images import part_images
from codec_dist.pipeline.run_directory import RunDirectory, StageRecord
from codec_dist.pipeline.runner import check_config, run_stages, submit_stage
from codec_dist.pipeline.stages import STAGES, check_choices, stages_of_command

__all__ = [
    "STAGES",
    "PipelineError",
    "RunDirectory",
    "StageRecord",
    "check_choices",
    "check_config",
    "part_images",
    "run_stages",
    "stages_of_command",
    "submit_stage",
]
