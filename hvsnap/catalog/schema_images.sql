-- Images: snapshots that were promoted to templates. The snapshot behind one cannot be deleted.
CREATE TABLE images (
    id          TEXT PRIMARY KEY,
    name        TEXT NOT NULL UNIQUE,
    description TEXT NOT NULL,
    snapshot    TEXT NOT NULL REFERENCES snapshots (id),
    created_at  REAL NOT NULL
) STRICT;
CREATE INDEX images_by_snapshot ON images (snapshot);

-- Images that are not (yet, or any more) in the table above, and whose objects the store may hold: to be removed from it.
CREATE TABLE image_objects_to_remove (
    id TEXT PRIMARY KEY
) STRICT, WITHOUT ROWID;
