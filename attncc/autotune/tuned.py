"""What the records of a variant give a device: the configs of an emitted package, and why these.

A device with records of its own gets their table. Another one gets that of the card nearest to it among those of its
architecture, without the configs that do not fit it. Times of different toolchains do not compare, and a certificate
speaks for the kernels of one: of each card the records of the newest toolchain count.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from attncc.autotune.record import Card, Record, Toolchain
from attncc.autotune.store import Store
from attncc.autotune.table import LOSS, Decision, Outcome, Row, axes_of, certified, decide, pick, row_of, sizes_of
from attncc.codegen.configs import Measured, Plain, TargetConfigs, configs_text
from attncc.device import ARCHITECTURES, CARDS, Device, nearest
from attncc.driver import default_config, load, lower
from attncc.errors import TuneError
from attncc.ir.attention import Attention
from attncc.ir.text import digest

SHOWN: Final = 12
"""Measurements that a file of configs has."""
RATES: Final = ("sms", "bandwidth_gbps", "bf16_tflops")
SIZES: Final = ("arch", "sms", "shared_bytes_per_block", "l2_bytes", "bandwidth_gbps", "bf16_tflops")


@dataclass(frozen=True, slots=True)
class Choice:
    """The config that a package has for sizes on a device."""

    device: str
    sizes: Mapping[str, int]
    config: Mapping[str, int]
    rule: str
    """Which row of what."""
    origin: str
    ms: float | None
    """Measured for these sizes, on the card that `origin` names."""
    default_ms: float | None


def tuned_configs(attn: Attention, records: Iterable[Record], device: Device) -> TargetConfigs | None:
    """The configs that records of a variant, as it leaves the passes, give a device; None where no certified one wins.

    Raises:
        Unsupported: nothing is known of the device's architecture.
    """
    fallback = default_config(attn, device).rows
    same = [r for r in records if r.card.arch == device.arch and _is_whole(r.config, fallback)]
    decisions: dict[Card, Decision] = {}
    for card in {r.card: None for r in same}:
        decision = _decided(attn, [r for r in same if r.card == card], fallback, device)
        if decision is not None:
            decisions[card] = decision
    if not decisions:
        return None
    card = _closest(device, tuple(decisions))
    decision = decisions[card]
    certificate = _certificate(decision, card)
    order = dict.fromkeys(knob for _, config in fallback for knob in config)
    return TargetConfigs(
        target=device.name,
        rows=tuple((bounds, {k: config[k] for k in order if k in config}) for bounds, config in decision.rows),
        origin=_origin(card, device, certificate),
        device=_facts(device),
        certificate=certificate,
        measured=_measured(decision, _is_packed(attn)),
    )


def from_store(store: Store, say: Callable[[str], None]) -> Callable[[Attention, Device, str], TargetConfigs | None]:
    """What `driver.compile` asks for tuned configs: reads the store, and says what a device was given from it."""

    def tuned(attn: Attention, device: Device, program: str) -> TargetConfigs | None:
        records = [r for r in store.records(program=program) if r.card.arch == device.arch]
        configs = tuned_configs(attn, records, device) if records else None
        if configs is not None:
            about = configs.certificate
            say(f"{device.name}: configs measured on {about['card']}, {about['date']}, at {about['shapes']} shapes")
        elif records:
            say(f"{device.name}: the default rule, for none of {len(records)} records has a certified config that wins")
        return configs

    return tuned


def export(source: str, device: Device, store: Store) -> str:
    """The text of a tuned device's configs alone.

    Raises:
        TuneError: the store has nothing certified for it.
    """
    program = load(source).attention
    attn, _ = lower(program)
    configs = tuned_configs(attn, store.records(program=digest(program)), device)
    if configs is None:
        hint = f"tune it on a card of {device.arch}, or name another store by --store"
        raise TuneError(f"no certified record of '{attn.name}' for {device.name} in {store.root}", hint=hint)
    return configs_text(attn, configs)


def choose(source: str, shape: Mapping[str, int], device: Device, store: Store) -> Choice:
    """What a package compiled now would choose for sizes on a device, and the times that records have of it."""
    program = load(source).attention
    attn, _ = lower(program)
    records = [r for r in store.records(program=digest(program)) if r.card.arch == device.arch]
    default = default_config(attn, device)
    configs = tuned_configs(attn, records, device) or default
    sizes = sizes_of(shape, _is_packed(attn))
    bounds, config = row_of(configs.rows, sizes)
    at = configs.certificate.get("card", device.name)
    here = [r for r in records if r.card.name == at and shape.items() <= r.shape.items()]
    limits = ", ".join(f"{name} <= {most}" for name, most in bounds.items())
    return Choice(
        device=device.name,
        sizes=sizes,
        config=config,
        rule=f"row {configs.rows.index((bounds, config)) + 1} of {len(configs.rows)}: {limits or 'all other sizes'}",
        origin=configs.origin,
        ms=_time(here, config),
        default_ms=_time(here, pick(default.rows, sizes)),
    )


def _time(records: Sequence[Record], config: Mapping[str, int]) -> float | None:
    """The newest measurement of a config; of several masks the slowest."""
    times = {r.sparsity: r.ms for r in sorted(records, key=lambda r: r.when) if r.config == dict(config) and r.ms}
    return max(times.values(), default=None)


def _is_packed(attn: Attention) -> bool:
    return attn.layout == "varlen"


def _is_whole(config: Mapping[str, int], fallback: Sequence[Row]) -> bool:
    """Whether a config has every knob of the default rule's, an engine's where it uses one, and no other."""
    plain = [set(c) for _, c in fallback if not c.get("ENGINE")]
    engine = [set(c) for _, c in fallback if c.get("ENGINE")]
    if config.get("ENGINE"):
        return any(knobs == set(config) for knobs in engine)
    least = set.intersection(*plain, *engine)
    return least <= set(config) <= set.union(*plain, *engine)


def _decided(attn: Attention, records: Sequence[Record], fallback: Sequence[Row], device: Device) -> Decision | None:
    """The table of one card's records, without what does not fit a device that is another card."""
    newest = max(records, key=lambda r: r.when).toolchain
    records = [r for r in records if r.toolchain == newest]
    if records[0].card.name != device.name:
        too_large = {r.knobs for r in records if r.ms is not None and not _fits(r, device)}
        records = [r for r in records if r.knobs not in too_large]
    if not certified(records):
        return None
    decision = decide(records, fallback, LOSS, _is_packed(attn), axes_of(attn))
    return decision if any(r.certificate for r in decision.used) else None


def _fits(record: Record, device: Device) -> bool:
    return record.resources is not None and record.resources.shared_bytes <= device.shared_bytes_per_block


def _closest(device: Device, cards: Sequence[Card]) -> Card:
    """The device's own card, else the physically nearest."""
    own = [card for card in cards if card.name == device.name]
    if own:
        return own[0]
    like = {replace(device, **card.model_dump()): card for card in cards}
    return like[nearest(device, like)]


# -- what the file says ------------------------------------------------------------------------


def _facts(device: Device) -> Mapping[str, Plain]:
    """By which a package finds the nearest card; an architecture is none."""
    if device.name in ARCHITECTURES:
        return {}
    rates = {c.name: tuple(getattr(c, k) for k in RATES) for c in CARDS.values() if c.arch == device.arch}
    return {k: getattr(device, k) for k in SIZES} | {"cards": rates}


def _certificate(decision: Decision, card: Card) -> Mapping[str, Plain]:
    """What holds of every certified config of a table."""
    certificates = [r.certificate for r in decision.used if r.certificate]
    tools = decision.used[0].toolchain
    inputs = [i for i in certificates[0].inputs if all(i in c.inputs for c in certificates)]
    shared = [r.resources.shared_bytes for r in decision.used if r.resources]
    return {
        "card": card.name,
        "date": max(r.when for r in decision.used).date().isoformat(),
        **{name: _printable(text) for name, text in tools.model_dump().items() if text},
        "shapes": len(decision.losses),
        "loss": round(decision.stated, 4),
        **({"unmeasured": decision.unmeasured} if decision.unmeasured else {}),
        "cases": min(c.cases for c in certificates),
        "worst": round(max(c.worst for c in certificates), 4),
        "gradients": all(c.gradients for c in certificates),
        **({"shared_bytes": max(shared)} if len(shared) == len(decision.used) else {}),
        "inputs": tuple(map(_printable, inputs)),
    }


def _printable(text: str) -> str:
    """Records come from other machines: nothing in them is more than a word in a file."""
    return re.sub(r"[^\w .,:;+()\[\]-]", "?", text, flags=re.ASCII)


def _origin(card: Card, device: Device, certificate: Mapping[str, Plain]) -> str:
    near = "" if card.name == device.name else f"Not measured here: nearest card of {device.arch}, {card.name}. "
    tools = ", ".join(f"{name} {certificate[name]}" for name in Toolchain.model_fields if name in certificate)
    inputs = certificate["inputs"]
    kinds = f", on inputs {', '.join(map(str, inputs))}" if isinstance(inputs, tuple) and inputs else ""
    return (
        f"{near}Measured on {card.name}, {certificate['date']}, with {tools}: at {certificate['shapes']} shapes at "
        f"most {certificate['loss']:.1%} slower than the best config known. Each config agreed with the oracle in at "
        f"least {certificate['cases']} cases{kinds}; the largest error was {certificate['worst']:.0%} of the limit. "
        "Rows for sizes that no tuned shape is like are the default rule's."
    )


def _measured(decision: Decision, packed: bool) -> tuple[Measured, ...]:
    """A few shapes, small to large; of one shape the slowest mask."""
    slowest: dict[tuple[tuple[str, int], ...], Outcome] = {}
    for outcome in sorted((o for o in decision.outcomes if o.ms), key=lambda o: o.ms or 0):
        slowest[tuple(sorted(outcome.shape.items()))] = outcome
    found = [(sizes_of(o.shape, packed), o.ms, o.default_ms) for o in slowest.values() if o.ms]
    found.sort(key=lambda m: m[0]["pairs"])
    few = found[:: -(-len(found) // SHOWN)]
    return tuple(({k: n for k, n in sizes.items() if k != "pairs"}, ms, default) for sizes, ms, default in few)
