"""Which stored features feed which input ("role") of a head."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mmc.heads import needs
from mmc.heads.models.base import Head
from mmc.store.errors import InputError

if TYPE_CHECKING:
    from mmc.store import EmbeddingStore

SHARED_SPACE = ("image", "text")
"""Fields that lie in the space of the label texts; where a backbone has both the first is taken."""
NOT_BY_DEFAULT = ("itm", "region_scores")
"""Floats per sample that are no embedding: read only when they are named."""


def resolve(
    store: "EmbeddingStore", spec: Sequence[str] | None, head: type[Head], name: str
) -> dict[str, str]:
    """Role -> feature name ("alias/field") of what ``head`` (called ``name``) is to read.

    Args:
        spec: items ``alias`` (all its pooled fields), ``alias/field`` or ``role=alias/field``,
            each possibly several separated by commas; None or empty: all pooled fields of the
            store (for a head of tokens see `needs`). A head on label texts gets one field of the
            alias that has them: ``image``, or ``text`` where there is no image.

    A role is the field's name, or ``alias.field`` where several aliases give that field.

    Raises:
        InputError: an unknown feature, one that the head cannot read, too few or too many.
    """
    items = [part.strip() for item in spec or () for part in item.split(",") if part.strip()]
    if not store.features:
        raise InputError(f"{store.path} has no features yet; run `mmc extract` first")
    if head.needs:
        return needs.resolve(store, items, head, name)
    if items:
        chosen = _typed(store, items, head, name)
    elif head.wants_label_text:
        chosen = [(None, _with_label_text(store, name))]
    else:
        chosen = [(None, feature) for feature in store.features if by_default(store, feature)]
        if not chosen:
            raise InputError(
                f"{store.path} has no pooled field, which {name} needs "
                f"(it has: {', '.join(store.features)}); extract `image` or `text`"
            )
    roles = _roles(chosen)
    _check(store, roles, head, name)
    return roles


def is_pooled(store: "EmbeddingStore", feature: str) -> bool:
    """Whether the feature is one float vector per sample."""
    stored = store[feature]
    return len(stored.shape) == 2 and stored.dtype.kind == "f"


def by_default(store: "EmbeddingStore", feature: str) -> bool:
    """Whether a head gets this feature without asking for it by name."""
    return is_pooled(store, feature) and feature.split("/", 1)[1] not in NOT_BY_DEFAULT


def _typed(
    store: "EmbeddingStore", items: list[str], head: type[Head], name: str
) -> list[tuple[str | None, str]]:
    """(role or None, feature) of what the user named."""
    chosen: list[tuple[str | None, str]] = []
    for item in items:
        role, equals, target = item.rpartition("=")
        if equals and not role:
            raise InputError(f"--features {item}: write role=alias/field")
        if "/" in target or equals:
            chosen.append((role or None, _known(store, target)))
            continue
        if target not in store.aliases:
            raise InputError(
                f"--features {item}: the store has no such alias; it has: "
                f"{', '.join(store.aliases)} (features: {', '.join(store.features)})"
            )
        fields = [f for f in store.features if f.startswith(f"{target}/") and by_default(store, f)]
        if head.wants_label_text:
            shared = [f"{target}/{name}" for name in SHARED_SPACE]
            fields = [f for f in shared if f in fields][:1] or fields
        if not fields:
            raise InputError(f"--features {item}: {target} has no pooled field, which {name} needs")
        chosen.extend((None, field) for field in fields)
    return chosen


def _known(store: "EmbeddingStore", feature: str) -> str:
    if feature not in store.features:
        raise InputError(
            f"the store has no feature {feature!r}; it has: {', '.join(store.features)}"
        )
    return feature


def _with_label_text(store: "EmbeddingStore", name: str) -> str:
    """The field of the (one) alias with label texts that lies in their space."""
    having = []
    for alias in store.aliases:
        shared = [f"{alias}/{field}" for field in SHARED_SPACE]
        fields = [feature for feature in shared if feature in store.features]
        if fields and store.label_text(alias) is not None:
            having.append(fields[0])
    if len(having) == 1:
        return having[0]
    if having:
        aliases = [feature.split("/", 1)[0] for feature in having]
        raise InputError(
            f"{name} reads one alias and {', '.join(aliases)} have label texts: choose with "
            f"--features {aliases[0]}"
        )
    raise InputError(
        f"{name} needs label texts, and an `image` or `text` field of the same backbone; no alias "
        f"of {store.path} has both: extract with a backbone that reads texts, such as CLIP"
    )


def _roles(chosen: list[tuple[str | None, str]]) -> dict[str, str]:
    """Give every feature its role; each role once."""
    fields = [feature.split("/", 1)[1] for role, feature in chosen if role is None]
    roles: dict[str, str] = {}
    for role, feature in chosen:
        if role is None:
            alias, field = feature.split("/", 1)
            role = field if fields.count(field) == 1 else f"{alias}.{field}"
        if role in roles:
            raise InputError(
                f"--features: {role} is given twice ({roles[role]} and {feature}); "
                "name the roles with role=alias/field"
            )
        if feature in roles.values():
            raise InputError(f"--features: {feature} is given twice")
        roles[role] = feature
    return roles


def _check(store: "EmbeddingStore", roles: dict[str, str], head: type[Head], name: str) -> None:
    """Raise InputError unless the head can read these features."""
    given = ", ".join(roles.values())
    if head.reads == "pooled":
        for feature in roles.values():
            if not is_pooled(store, feature):
                shape = " x ".join(map(str, store[feature].shape[1:])) or "one value"
                raise InputError(
                    f"{name} reads pooled fields (one vector per sample); {feature} holds {shape} "
                    f"of {store[feature].dtype} per sample"
                )
    if len(roles) < head.min_inputs:
        raise InputError(
            f"{name} needs {head.min_inputs} or more fields, got {len(roles)} ({given}); the store "
            f"has: {', '.join(store.features)}"
        )
    if head.max_inputs is not None and len(roles) > head.max_inputs:
        raise InputError(
            f"{name} reads at most {head.max_inputs} field, got {len(roles)} ({given}); choose "
            "with --features alias/field"
        )
    if head.wants_label_text:
        for feature in roles.values():
            alias, field = feature.split("/", 1)
            if store.label_text(alias) is None:
                raise InputError(
                    f"{name} needs label texts, and {alias} has none; extract with a backbone "
                    "that reads texts, such as CLIP"
                )
            if head.reads == "pooled" and field not in SHARED_SPACE:
                raise InputError(
                    f"{name} compares a field with the label texts, and {feature} is not in their "
                    f"space; choose from {alias}'s {' and '.join(SHARED_SPACE)}"
                )
