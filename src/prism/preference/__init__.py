"""Preferences: labelled pairs of videos and the latents they are about. Knows no model."""

from prism.preference.pairs import PromptGroup as PromptGroup
from prism.preference.pairs import check_disjoint as check_disjoint
from prism.preference.pairs import group_by_prompt as group_by_prompt
from prism.preference.pairs import pairs_from_scores as pairs_from_scores
from prism.preference.pairs import prompt_key as prompt_key
from prism.preference.store import LatentStore as LatentStore
from prism.preference.writer import StoreWriter as StoreWriter
from prism.preference.writer import unit_name as unit_name
from prism.preference.writer import write_store as write_store
