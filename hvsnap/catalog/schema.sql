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
    manifest_revision INTEGER NOT NULL DEFAULT 0,        -- of the manifest in the store
    manifest_changes  INTEGER NOT NULL DEFAULT 0,        -- to what it says, since that was written
    UNIQUE (disk, sequence)
) STRICT;
CREATE INDEX snapshots_by_parent ON snapshots (parent);
CREATE INDEX snapshots_to_write ON snapshots (number) WHERE manifest_changes > 0;

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

-- Durable packs. 'live_bytes' are the stored bytes of the blocks that are still in 'blocks'. 'to_sweep' counts the changes
-- since a sweep last looked at the pack. 'indexed' says whether the digests of its blocks are in 'digests'. 'verified_at' is
-- when all its blocks were last read and found whole.
CREATE TABLE packs (
    number      INTEGER PRIMARY KEY AUTOINCREMENT,
    name        TEXT NOT NULL UNIQUE,
    size_bytes  INTEGER NOT NULL,
    live_blocks INTEGER NOT NULL,
    live_bytes  INTEGER NOT NULL,
    indexed     INTEGER NOT NULL DEFAULT 0,
    to_sweep    INTEGER NOT NULL DEFAULT 0,
    verified_at REAL
) STRICT;
CREATE INDEX packs_not_indexed ON packs (number) WHERE NOT indexed;

-- Durable blocks, 512 ids a row: which of the ids there are (ranges.encode_live), and where they lie (ranges.encode).
-- 'live' has one size, and comes first: to drop a few blocks, SQLite writes the one page of the row that it is in.
CREATE TABLE blocks (
    range   INTEGER PRIMARY KEY,
    live    BLOB NOT NULL,
    entries BLOB NOT NULL
) STRICT;

-- The ranges that hold blocks of a pack, and perhaps some that no longer do.
CREATE TABLE pack_ranges (
    pack  INTEGER NOT NULL REFERENCES packs (number) ON DELETE CASCADE,
    range INTEGER NOT NULL,
    PRIMARY KEY (pack, range)
) STRICT, WITHOUT ROWID;

-- Blocks by the first 47 bits of their digests. May hold too much, never too little but for packs that are not indexed.
CREATE TABLE digests (
    prefix INTEGER NOT NULL,
    block  INTEGER NOT NULL,
    PRIMARY KEY (prefix, block)
) STRICT, WITHOUT ROWID;

-- Rows of 'digests' whose blocks are gone: removed together, in order, once there are many.
CREATE TABLE stale_digests (
    prefix INTEGER NOT NULL,
    block  INTEGER NOT NULL,
    PRIMARY KEY (prefix, block)
) STRICT, WITHOUT ROWID;

-- Blocks whose stored form turned out to be damaged, until the same content is stored again.
CREATE TABLE damaged (
    block    INTEGER PRIMARY KEY,
    why      TEXT NOT NULL,
    found_at REAL NOT NULL
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
