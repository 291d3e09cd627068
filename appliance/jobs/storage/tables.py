"""The tables of files, batches and their lines, as SQLAlchemy Core: SQLite here, PostgreSQL where there are many nodes.

Times named `_at` are wall clock, seconds since the epoch.
"""

from sqlalchemy import Column, Float, Index, Integer, LargeBinary, MetaData, String, Table, Text, text

VERSION = 2
"""Written into `about`; tables of another version are refused, but for those that only lack what is new in this one."""
ADDS_TO = 1
"""The version that this one only adds tables to."""

metadata = MetaData()

about = Table("about", metadata, Column("version", Integer, primary_key=True))

files = Table(
    "files",
    metadata,
    Column("id", String, primary_key=True),
    Column("owner", String, nullable=False),
    Column("filename", String, nullable=False),
    Column("purpose", String, nullable=False),
    Column("size_bytes", Integer, nullable=False),
    Column("created_at", Float(53), nullable=False),
    Column("expires_at", Float(53)),
    Index("ix_files_owner", "owner", "created_at"),
)

batches = Table(
    "batches",
    metadata,
    Column("id", String, primary_key=True),
    Column("owner", String, nullable=False),
    Column("status", String, nullable=False),
    Column("created_at", Float(53), nullable=False),
    # Everything else of a batch, as JSON: it is read and written whole.
    Column("document", Text, nullable=False),
    Index("ix_batches_owner", "owner", "created_at"),
)

lines = Table(
    "lines",
    metadata,
    Column("batch_id", String, primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("offset", Integer, nullable=False),
    Column("length", Integer, nullable=False),
    Column("digest", LargeBinary, nullable=False),
    # The first line that asks the same, where the answer may be shared; empty for that one itself.
    Column("twin_of", Integer),
    # 0 waits, 1 answered, 2 failed, 3 lies in a provider's batch.
    Column("state", Integer, nullable=False),
    # Where in the output or error file what a duplicate copies is; set once it is there.
    Column("result_offset", Integer),
    Column("result_length", Integer),
    Index("ix_lines_twin", "batch_id", "twin_of", sqlite_where=text("twin_of IS NOT NULL")),
    Index("ix_lines_waiting", "batch_id", "number", sqlite_where=text("state = 0")),
)
"""One row a line that may be asked, from validation until the batch has ended."""

parcels = Table(
    "parcels",
    metadata,
    Column("name", String, primary_key=True),
    Column("batch_id", String, nullable=False, index=True),
    Column("target", String, nullable=False),
    Column("made_at", Float(53), nullable=False),
    # The provider's ids of its file and of its batch, as soon as they are known.
    Column("uploaded", String),
    Column("remote_id", String),
)
"""A part of a batch that was sent as one of a provider's, put down before it is sent."""

tickets = Table(
    "tickets",
    metadata,
    Column("batch_id", String, primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("parcel", String, nullable=False, index=True),
    # What was decided of the line and reserved for it (a line record).
    Column("ticket", Text, nullable=False),
)
"""One row a line that was sent in a provider's batch."""

WAITING, ANSWERED, FAILED, POSTED = 0, 1, 2, 3
