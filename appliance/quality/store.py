"""Labels, daily numbers and states, durably: every method is one transaction, in the store's own thread."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

from sqlalchemy import URL, Connection, delete, func, select
from sqlalchemy.dialects.sqlite import insert as upsert

from appliance.errors import Unavailable
from appliance.ledger.sqlite_store import SqliteStore, StoreSpec
from appliance.quality.models import COUNTS, FEEDBACK, DailyTraffic, Labelled, LearningState
from appliance.quality.tables import VERSION, labelled, metadata, states, traffic

_MOST_SCORES: Final = 20_000
"""Audited rows that a threshold is estimated from: the newest. More would only remember older traffic."""


STORE_SPEC: Final = StoreSpec(
    name="learning-store",
    metadata=metadata,
    version=VERSION,
    # What is removed is overwritten, and no log of it stays: a text that was deleted is gone from the disk.
    pragmas=("journal_mode=TRUNCATE", "secure_delete=ON"),
    unavailable=Unavailable,
    cannot_grow="labels cannot be kept ({reason}): free space on the disk",
    cannot_be_used="labels cannot be read or kept ({reason}): check the data directory and its disk",
    other_version="{place} has tables of version {found}, this appliance knows {known}: move it away",
)


class LearningStore(SqliteStore):
    """`open` it, and `close` it. Every method raises Unavailable, or StorageFull where the disk is full."""

    @classmethod
    async def open(cls, path: Path) -> "LearningStore":
        return await cls._open(URL.create("sqlite", database=str(path)), STORE_SPEC)

    async def add_labels(self, rows: Sequence[Labelled], days: Sequence[DailyTraffic]) -> None:
        """New labels, the newer one of a text counting, and numbers that are added to their days'."""

        def write(connection: Connection) -> None:
            for row in rows:
                values = asdict(row)
                change = upsert(labelled).values(values)
                connection.execute(change.on_conflict_do_update(index_elements=["decision_id", "index"], set_=values))
            for day in days:
                added = upsert(traffic).values(asdict(day))
                sums = {name: traffic.c[name] + added.excluded[name] for name in COUNTS}
                connection.execute(
                    added.on_conflict_do_update(index_elements=["classifier", "route", "day"], set_=sums)
                )

        await self._transact(write)

    async def get_label(self, decision_id: str, index: int) -> Labelled | None:
        here = (labelled.c.decision_id == decision_id) & (labelled.c.index == index)
        row = await self._transact(lambda one: one.execute(select(labelled).where(here)).mappings().first())
        return None if row is None else Labelled(**row)

    async def list_owners(self, classifier: str) -> Sequence[str]:
        """Keys that have texts to learn from."""
        mine = (labelled.c.classifier == classifier) & labelled.c.text.is_not(None)
        query = select(labelled.c.owner).where(mine).distinct().order_by(labelled.c.owner)
        return await self._transact(lambda one: one.execute(query).scalars().all())

    async def list_texts(self, classifier: str, owners: Sequence[str]) -> Sequence[Labelled]:
        """Rows that have a text, oldest first."""
        mine = (labelled.c.classifier == classifier) & labelled.c.text.is_not(None) & labelled.c.owner.in_(owners)
        query = select(labelled).where(mine).order_by(labelled.c.at)
        rows = await self._transact(lambda one: one.execute(query).mappings().all())
        return [Labelled(**row) for row in rows]

    async def count_labels(self, classifier: str) -> Mapping[str, int]:
        """Rows in all, those with a text, and those that were audited."""
        columns = (func.count(), func.count(labelled.c.text), func.count().filter(labelled.c.audited))
        query = select(*columns).where(labelled.c.classifier == classifier)
        rows, texts, audited = await self._transact(lambda one: one.execute(query).one())
        return {"labels": rows, "texts": texts, "audited": audited}

    async def list_scores(self, classifier: str, version: str) -> tuple[Sequence[tuple[float, bool]], Sequence[float]]:
        """Of one version's answers: confidence and rightness of the audited ones, and the confidences of those that
        were not drawn by chance and that feedback calls wrong."""
        columns = (labelled.c.own_confidence, labelled.c.own == labelled.c.label)
        mine = (labelled.c.classifier == classifier) & (labelled.c.version == version)
        newest = labelled.c.at.desc()
        audited = select(*columns).where(mine, labelled.c.audited).order_by(newest).limit(_MOST_SCORES)
        called_wrong = (
            mine & ~labelled.c.audited & (labelled.c.source == FEEDBACK) & (labelled.c.own != labelled.c.label)
        )
        wrong = select(labelled.c.own_confidence).where(called_wrong).order_by(newest).limit(_MOST_SCORES)

        def read(connection: Connection) -> tuple[Sequence[tuple[float, bool]], Sequence[float]]:
            rows = [(score, bool(right)) for score, right in connection.execute(audited)]
            return rows, connection.execute(wrong).scalars().all()

        return await self._transact(read)

    async def list_days(self, classifier: str, since_day: int) -> Sequence[DailyTraffic]:
        query = select(traffic).where(traffic.c.classifier == classifier, traffic.c.day >= since_day)
        rows = await self._transact(lambda one: one.execute(query.order_by(traffic.c.day)).mappings().all())
        return [DailyTraffic(**row) for row in rows]

    async def remove_owner(self, owner: str, classifier: str | None = None) -> int:
        """Remove a key's labels with their texts; how many there were."""
        mine = labelled.c.owner == owner
        if classifier is not None:
            mine &= labelled.c.classifier == classifier
        return await self._transact(lambda one: one.execute(delete(labelled).where(mine)).rowcount)

    async def prune(self, classifiers: Sequence[str], before_at: float, most: int) -> None:
        """Remove what is older than that, and of each classifier the oldest texts beyond `most`."""

        def write(connection: Connection) -> None:
            connection.execute(delete(labelled).where(labelled.c.at < before_at))
            for name in classifiers:
                mine = (labelled.c.classifier == name) & labelled.c.text.is_not(None)
                newest = select(labelled.c.at).where(mine).order_by(labelled.c.at.desc()).offset(most).limit(1)
                oldest_kept = connection.execute(newest).scalar()
                if oldest_kept is not None:
                    connection.execute(delete(labelled).where(mine, labelled.c.at <= oldest_kept))

        await self._transact(write)

    async def read_states(self) -> Mapping[str, LearningState]:
        rows = await self._transact(lambda one: one.execute(select(states)).mappings().all())
        found = {}
        for row in rows:
            document = json.loads(row["document"])
            found[row["classifier"]] = LearningState(**{**document, "news": tuple(document["news"])})
        return found

    async def save_state(self, classifier: str, state: LearningState) -> None:
        values = {"classifier": classifier, "document": json.dumps(asdict(state))}
        change = upsert(states).values(values).on_conflict_do_update(index_elements=["classifier"], set_=values)
        await self._transact(lambda one: one.execute(change))

    async def remove_classifier(self, classifier: str) -> None:
        """Everything of a classifier that was removed, so that another one of its name begins anew."""

        def write(connection: Connection) -> None:
            for table in (labelled, traffic, states):
                connection.execute(delete(table).where(table.c.classifier == classifier))

        await self._transact(write)
