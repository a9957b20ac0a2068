-- What each snapshot found changed since the one that it builds on, 'hours' before it (NULL: it builds on none). Kept
-- beyond the snapshot, so that a disk whose snapshots do not stay long has a past to be compared with.
CREATE TABLE changes (
    disk         TEXT NOT NULL REFERENCES disks (id),
    at           REAL NOT NULL,
    hours        REAL,
    data_bytes   INTEGER NOT NULL,
    stored_bytes INTEGER NOT NULL,
    PRIMARY KEY (disk, at)
) STRICT, WITHOUT ROWID;
INSERT OR IGNORE INTO changes
    SELECT s.disk, s.created_at, (s.created_at - p.created_at) / 3600.0, s.changed_bytes, s.stored_bytes
    FROM snapshots s LEFT JOIN snapshots p ON p.id = s.parent WHERE s.state = 'accomplished';

ALTER TABLE snapshots ADD COLUMN alarm TEXT;  -- JSON of alarm.Alarm; NULL: nothing is unusual about it
ALTER TABLE snapshots ADD COLUMN held_until REAL;  -- until when no rule lets it go, after an alarm about a later one
