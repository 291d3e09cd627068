"""The tables of what classifiers learn from, as SQLAlchemy Core: a file of its own, so that texts lie in one place.

Times named `_at` are wall clock, seconds since the epoch.
"""

from sqlalchemy import Boolean, Column, Float, Index, Integer, MetaData, String, Table, Text

VERSION = 1
"""Written into `about`; tables of another version are refused."""

metadata = MetaData()

about = Table("about", metadata, Column("version", Integer, primary_key=True))

labelled = Table(
    "labelled",
    metadata,
    Column("decision_id", String, primary_key=True),
    Column("index", Integer, primary_key=True),
    Column("classifier", String, nullable=False),
    Column("route", String, nullable=False),
    # The key whose request it was.
    Column("owner", String, nullable=False),
    # What bound that request: an example of it is never used outside.
    Column("residency", String, nullable=False),
    # Which version of the classifier answered, what, and how surely; empty where it was not asked.
    Column("version", String),
    Column("own", Text),
    Column("own_confidence", Float(53), nullable=False),
    # What is right, and who says so: a target, or `feedback`.
    Column("label", Text, nullable=False),
    Column("source", String, nullable=False),
    # Whether it was drawn by chance: such rows stand for all traffic.
    Column("audited", Boolean, nullable=False),
    # Empty where the route keeps no texts.
    Column("text", Text),
    Column("at", Float(53), nullable=False),
    Index("ix_labelled_classifier", "classifier", "at"),
    Index("ix_labelled_owner", "owner"),
)
"""One row a text that a better model, or feedback, has labelled."""

traffic = Table(
    "traffic",
    metadata,
    Column("classifier", String, primary_key=True),
    Column("route", String, primary_key=True),
    # Days since the epoch, UTC.
    Column("day", Integer, primary_key=True),
    Column("texts", Integer, nullable=False),
    Column("local", Integer, nullable=False),
    Column("went_on", Integer, nullable=False),
    Column("capped", Integer, nullable=False),
    Column("audited", Integer, nullable=False),
    Column("agreed", Integer, nullable=False),
    Column("feedback", Integer, nullable=False),
)
"""Numbers of texts, day by day. `agreed`: of the audited ones. No text and no label."""

states = Table(
    "states",
    metadata,
    Column("classifier", String, primary_key=True),
    Column("document", Text, nullable=False),
)
"""How far the learning of each classifier is, as JSON."""
