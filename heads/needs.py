"""Which features a head of tokens reads: what it needs, the masks of that, what the user overrides.

The user names an alias and the head's needs choose among its fields; or the user names fields, and
the head fills what it cannot do without. Either way each field brings its mask and whatever the
head reads besides, under the same prefix: ``left.text_tokens`` brings ``left.text_mask``.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from mmc.heads.models.base import Head, Need
from mmc.store.errors import InputError

if TYPE_CHECKING:
    from mmc.store import EmbeddingStore

MASKED = ("text_tokens", "text_ids", "fused_tokens", "regions")
"""Fields with places that may hold nothing: reading them without their mask would be wrong."""
EXTRA_OF = {
    "boxes": "regions",
    "region_scores": "regions",
    "image_places": "image_tokens",
    "image_class": "image_tokens",
}
"""What comes with a field where a head reads it."""

Chosen = dict[str, str]
"""Role -> feature."""


def mask_of(name: str) -> str:
    """Field or role of tokens -> that of their mask: ``a.text_tokens`` -> ``a.text_mask``."""
    prefix, dot, field = name.rpartition(".")
    stem = "region" if field == "regions" else field.removesuffix("_tokens").removesuffix("_ids")
    return f"{prefix}{dot}{stem}_mask"


def sibling(role: str, field: str) -> str:
    """The role of another field of the same sort: ``a.regions``, ``boxes`` -> ``a.boxes``."""
    prefix, dot, _ = role.rpartition(".")
    return f"{prefix}{dot}{field}"


def resolve(
    store: "EmbeddingStore", items: Sequence[str], head: type[Head], name: str
) -> dict[str, str]:
    """Role -> feature of what ``head`` (called ``name``), which has needs, is to read.

    Args:
        items: ``alias``, ``alias/field`` or ``role=alias/field``, as the user typed them; none:
            what the head needs of every alias.

    Raises:
        InputError: an unknown name, or something is missing that the head needs.
    """
    aliases = [item for item in items if "/" not in item and "=" not in item]
    for alias in aliases:
        if alias not in store.aliases:
            raise InputError(
                f"--features {alias}: the store has no such alias; it has: "
                f"{', '.join(store.aliases)} (features: {', '.join(store.features)})"
            )
    roles, plain = _typed(store, [item for item in items if item not in aliases])
    if aliases or not items:
        for feature in _wanted(store, aliases or store.aliases, head, name):
            if feature not in plain and feature not in roles.values():
                plain.append(feature)
    fields = [_field(feature) for feature in plain]
    for feature in plain:
        alias, field = feature.split("/", 1)
        _add(roles, field if fields.count(field) == 1 else f"{alias}.{field}", feature)
    _fill(store, roles, head, name, aliases)
    for role, feature in list(roles.items()):
        _add_companions(store, roles, role, feature, head)
    if head.wants_label_text:
        read = {feature.split("/", 1)[0] for feature in roles.values()}
        if all(store.label_text(alias) is None for alias in read):
            raise InputError(
                f"{name} needs label texts, and {', '.join(sorted(read))} has none; extract with a "
                "backbone that reads texts, such as CLIP"
            )
    return roles


def _typed(store: "EmbeddingStore", items: Iterable[str]) -> tuple[Chosen, list[str]]:
    """Features with a role that the user gave them, and those without."""
    roles: Chosen = {}
    plain: list[str] = []
    for item in items:
        role, equals, feature = item.rpartition("=")
        if equals and not role:
            raise InputError(f"--features {item}: write role=alias/field")
        if feature not in store.features:
            raise InputError(
                f"the store has no feature {feature!r}; it has: {', '.join(store.features)}"
            )
        if feature in plain or feature in roles.values():
            raise InputError(f"--features: {feature} is given twice")
        if equals:
            _add(roles, role, feature)
        else:
            plain.append(feature)
    return roles, plain


def _wanted(
    store: "EmbeddingStore", aliases: Sequence[str], head: type[Head], name: str
) -> list[str]:
    """What the head's needs choose among the fields of the aliases."""
    chosen: list[str] = []
    for need in head.needs:
        found = _having(store, aliases, need)
        if need.one and len(found) > 1:
            raise InputError(
                f"{name} reads one {need.fields[0]}, and the store has {', '.join(found)}: choose "
                f"with --features {found[0]}"
            )
        chosen.extend(feature for feature in found if feature not in chosen)
    return chosen


def _having(store: "EmbeddingStore", aliases: Iterable[str], need: Need) -> list[str]:
    """The feature of each alias that meets the need."""
    found = []
    for alias in aliases:
        features = (f"{alias}/{field}" for field in need.fields)
        found.extend([feature for feature in features if feature in store.features][:1])
    return found


def _fill(
    store: "EmbeddingStore", roles: Chosen, head: type[Head], name: str, aliases: Sequence[str]
) -> None:
    """Add what the head cannot do without and nobody named; raise where there is none."""
    for need in head.needs:
        if need.optional or any(_field_of_role(role) in need.fields for role in roles):
            continue
        found = _having(store, store.aliases, need)
        if not found:
            raise _lacking(store, [need], name, aliases)
        if len(found) > 1:
            raise InputError(
                f"{name} reads one {need.fields[0]}, and the store has {', '.join(found)}: choose "
                f"with --features {found[0]}"
            )
        _add(roles, _field(found[0]), found[0])
    if not any(_field_of_role(role) in need.fields for role in roles for need in head.needs):
        named = all(_field_of_role(role) == _field(feature) for role, feature in roles.items())
        if roles and not named:
            raise InputError(
                f"{name} calls its inputs by their field, with a prefix if there are several "
                f"(left.text_tokens=alias/text_tokens); it knows no {next(iter(roles))!r}"
            )
        raise _lacking(store, head.needs, name, aliases)


def _add_companions(
    store: "EmbeddingStore", roles: Chosen, role: str, feature: str, head: type[Head]
) -> None:
    """Add the mask of a feature, and what the head reads besides."""
    alias, field = feature.split("/", 1)
    if field not in MASKED and len(store[feature].shape) < 3:
        return  # one vector: there is nothing to mask
    mask_role, mask = mask_of(role), f"{alias}/{mask_of(field)}"
    if mask in store.features:
        roles.setdefault(mask_role, mask)
    elif field in MASKED and mask_role not in roles:
        raise InputError(
            f"{feature} has no mask in {store.path}, so its padding would be read as content; "
            f"run `mmc extract` for {alias} again with --fields {field},{mask_of(field)}"
        )
    for extra in head.extras:
        if EXTRA_OF[extra] == field == _field_of_role(role):
            found = f"{alias}/{extra}"
            if found in store.features and found not in roles.values():
                roles.setdefault(sibling(role, extra), found)


def _add(roles: Chosen, role: str, feature: str) -> None:
    if role in roles:
        raise InputError(
            f"--features: {role} is given twice ({roles[role]} and {feature}); "
            "name the roles with role=alias/field"
        )
    roles[role] = feature


def _lacking(
    store: "EmbeddingStore", needs: Sequence[Need], name: str, aliases: Sequence[str]
) -> InputError:
    """What is missing and which extraction would give it."""
    fields = [need.fields[0] for need in needs]
    words = " and ".join(fields) if all(not n.optional for n in needs) else " or ".join(fields)
    asked = fields if len(fields) == 1 else fields[:1]
    asked = [
        f for field in asked for f in ([field, mask_of(field)] if field in MASKED else [field])
    ]
    others = [f for need in needs for f in _having(store, store.aliases, need)]
    if aliases and others:
        every = " or ".join(dict.fromkeys(field for need in needs for field in need.fields))
        return InputError(
            f"{name} reads {every if needs[0].optional else words}, and {', '.join(aliases)} of "
            f"{store.path} does not have that; choose with --features {others[0]}"
        )
    alias = (list(aliases) or list(store.aliases))[0]
    spec = store.provenance(alias).context.get("spec", "SPEC")
    where = f"{', '.join(aliases)} of {store.path}" if aliases else store.path
    return InputError(
        f"{name} reads {words}, and {where} has only {', '.join(store.features)}; run `mmc extract "
        f"SOURCE {store.path} --backbone {spec} --name {alias} --fields {','.join(asked)}` (or "
        "with a backbone that gives it: `mmc list backbones`)"
    )


def _field(feature: str) -> str:
    return feature.split("/", 1)[1]


def _field_of_role(role: str) -> str:
    return role.rpartition(".")[2]
