-- Disks that were made here, and of what: the id of a snapshot or image, which may be gone by now. 'inode' is that of
-- the file that was made: another file at the path is another disk. NULL: a block device.
CREATE TABLE origins (
    path       TEXT PRIMARY KEY,
    inode      INTEGER,
    made_of    TEXT NOT NULL,
    created_at REAL NOT NULL
) STRICT, WITHOUT ROWID;

-- Since when a disk has been gone from its guest, or its guest from its hypervisor; NULL: it is there, as far as is known.
ALTER TABLE disks ADD COLUMN gone_since REAL;
