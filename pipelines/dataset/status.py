"""The kind and the status of a row, and the reason if it is not kept. Light, so that configuration may import it."""

from enum import StrEnum

PAIR, JUDGED, PRIOR = "pair", "judged", "prior"
KINDS = (PAIR, JUDGED, PRIOR)
"""Kinds of rows: a pair; one image, good (label_0 1) or bad (0); one image of a class, for prior preservation."""


class Status(StrEnum):
    """The status of a source row. Rows read = kept + tie + duplicate + quarantined, always."""

    KEPT = "kept"
    TIE = "tie"
    DUPLICATE = "duplicate"
    QUARANTINED = "quarantined"


class ScoreStatus(StrEnum):
    """The status of a score. A failure has a reason, and never a number."""

    SCORED = "scored"
    FAILED = "failed"


class Reason(StrEnum):
    """Why a row is not kept; the reference page explains each."""

    EQUAL_PREFERENCE = "equal_preference"
    WEAK_PREFERENCE = "weak_preference"
    REPEATED = "repeated"
    CONFLICTING_LABEL = "conflicting_label"
    REMOVED = "removed"
    SPLIT_CONFLICT = "split_conflict"
    UNREADABLE_ROW = "unreadable_row"
    MISSING_PROMPT = "missing_prompt"
    EMPTY_PROMPT = "empty_prompt"
    UNREADABLE_PROMPT = "unreadable_prompt"
    OVERLONG_PROMPT = "overlong_prompt"
    MISSING_LABEL = "missing_label"
    UNREADABLE_LABEL = "unreadable_label"
    INCONSISTENT_LABELS = "inconsistent_labels"
    UNREADABLE_WEIGHT = "unreadable_weight"
    MISSING_IMAGE = "missing_image"
    EMPTY_IMAGE = "empty_image"
    NOT_AN_IMAGE = "not_an_image"
    UNSUPPORTED_FORMAT = "unsupported_format"
    TRUNCATED_IMAGE = "truncated_image"
    IMAGE_TOO_LARGE = "image_too_large"
    IMAGE_TOO_SMALL = "image_too_small"
    ANIMATED_IMAGE = "animated_image"
    IMAGE_OUTSIDE = "image_outside"
    URL_NOT_ALLOWED = "url_not_allowed"
    UNREACHABLE_IMAGE = "unreachable_image"
    IDENTICAL_IMAGES = "identical_images"
    NON_FINITE = "non_finite"
