-- What was stored from a moment on: of a chain (the disk's id), of the whole store ('host'), and what is used of the
-- store's device ('device'). A value holds until the next one. Older values are averages (metering.thin).
CREATE TABLE usage (
    subject TEXT NOT NULL,
    at      REAL NOT NULL,
    bytes   INTEGER NOT NULL,
    PRIMARY KEY (subject, at)
) STRICT, WITHOUT ROWID;
