-- Version 1 of the catalog. Times are seconds since the epoch (UTC), sizes are bytes.
-- Every change after a release is a new script in migrations.py; a released version is never edited.

CREATE TABLE disks (
    id          TEXT PRIMARY KEY,
    guest_uuid  TEXT NOT NULL,
    guest_name  TEXT NOT NULL,
    target      TEXT NOT NULL,
    serial      TEXT NOT NULL,
    source      TEXT NOT NULL,
    format      TEXT NOT NULL,
    size_bytes  INTEGER NOT NULL,
    system      INTEGER NOT NULL,
    created_at  REAL NOT NULL,
    released    INTEGER NOT NULL DEFAULT 0,
    head        TEXT REFERENCES snapshots (id),
    bitmap      TEXT,
    policy      TEXT REFERENCES policies (id),
    delete_auto_with_disk INTEGER NOT NULL DEFAULT 0,
    encrypted   INTEGER NOT NULL DEFAULT 0
) STRICT;
-- What makes a disk the same disk: its guest, its serial (its target if it has none) and its image.
CREATE UNIQUE INDEX disks_identity
    ON disks (guest_uuid, iif(serial <> '', 'serial ' || serial, 'target ' || target), source) WHERE NOT released;

CREATE TABLE snapshots (
    number          INTEGER PRIMARY KEY AUTOINCREMENT,   -- what pages refer to: small, and never used twice
    id              TEXT NOT NULL UNIQUE,
    disk            TEXT NOT NULL REFERENCES disks (id),
    sequence        INTEGER NOT NULL,
    parent          TEXT REFERENCES snapshots (id),
    name            TEXT NOT NULL,
    description     TEXT NOT NULL,
    kind            TEXT NOT NULL,
    method          TEXT NOT NULL,
    reason          TEXT NOT NULL,
    consistency     TEXT NOT NULL,
    state           TEXT NOT NULL,
    size_bytes      INTEGER NOT NULL,
    created_at      REAL NOT NULL,
    accomplished_at REAL,
    error           TEXT NOT NULL DEFAULT '',
    "group"         TEXT,
    read_bytes      INTEGER NOT NULL DEFAULT 0,
    changed_bytes   INTEGER NOT NULL DEFAULT 0,
    stored_bytes    INTEGER NOT NULL DEFAULT 0,
    tags            TEXT NOT NULL DEFAULT '{}',
    automatic       INTEGER NOT NULL DEFAULT 0,
    expires_at      REAL,
    retention       TEXT NOT NULL DEFAULT '',
    locked_until    REAL,
    UNIQUE (disk, sequence)
) STRICT;
CREATE INDEX snapshots_by_parent ON snapshots (parent);

-- When automatic snapshots are made. Lists are JSON.
CREATE TABLE policies (
    id          TEXT PRIMARY KEY,
    name        TEXT NOT NULL UNIQUE,
    hours       TEXT NOT NULL,
    weekdays    TEXT NOT NULL,
    timezone    TEXT NOT NULL,
    retain_days INTEGER,
    keep        TEXT NOT NULL,
    created_at  REAL NOT NULL
) STRICT;

CREATE TABLE packs (
    number     INTEGER PRIMARY KEY,
    name       TEXT NOT NULL UNIQUE,
    size_bytes INTEGER NOT NULL
) STRICT;

-- Durable blocks only. 'offset' and 'length' are of the stored form within the pack.
CREATE TABLE blocks (
    id     INTEGER PRIMARY KEY,
    digest BLOB NOT NULL UNIQUE,
    pack   INTEGER NOT NULL REFERENCES packs (number),
    offset INTEGER NOT NULL,
    length INTEGER NOT NULL,
    flags  INTEGER NOT NULL
) STRICT;

-- Entries of a snapshot that differ from its parent: chain.encode(). A failed snapshot has none.
CREATE TABLE pages (
    snapshot INTEGER NOT NULL REFERENCES snapshots (number),
    page     INTEGER NOT NULL,
    entries  BLOB NOT NULL,
    PRIMARY KEY (snapshot, page)
) STRICT, WITHOUT ROWID;

-- Blocks that the next capture of a disk must read although no bitmap names them: those that a deleted head had changed.
CREATE TABLE carry (
    disk    TEXT NOT NULL REFERENCES disks (id),
    page    INTEGER NOT NULL,
    indexes BLOB NOT NULL,
    PRIMARY KEY (disk, page)
) STRICT, WITHOUT ROWID;

-- The journal: a row is an operation that has begun and is not yet settled.
CREATE TABLE operations (
    id         TEXT PRIMARY KEY,
    kind       TEXT NOT NULL,
    guest_uuid TEXT NOT NULL,
    step       TEXT NOT NULL,
    facts      TEXT NOT NULL,
    created_at REAL NOT NULL
) STRICT;

-- What happened, in order; unpublished rows are the outbox for MQTT.
CREATE TABLE events (
    sequence  INTEGER PRIMARY KEY AUTOINCREMENT,
    id        TEXT NOT NULL UNIQUE,
    type      TEXT NOT NULL,
    at        REAL NOT NULL,
    payload   TEXT NOT NULL,
    published INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX events_unpublished ON events (sequence) WHERE NOT published;

CREATE TABLE meta (
    key   TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT;
