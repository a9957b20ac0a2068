-- Restore drills: when which snapshot was restored for trial, and what came of it (drill.Outcome). The newest few of each
-- disk; a snapshot may be gone by now.
CREATE TABLE drills (
    number        INTEGER PRIMARY KEY AUTOINCREMENT,
    disk          TEXT NOT NULL REFERENCES disks (id),
    snapshot      TEXT NOT NULL,
    began_at      REAL NOT NULL,
    ended_at      REAL NOT NULL,
    outcome       TEXT NOT NULL,
    written_bytes INTEGER NOT NULL,
    error         TEXT NOT NULL
) STRICT;
CREATE INDEX drills_by_disk ON drills (disk, number);
