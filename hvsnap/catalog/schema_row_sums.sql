-- CRC-32 over a row's other columns (row_sums.py). NULL: of an earlier version; the next start writes it.
ALTER TABLE disks ADD COLUMN row_sum INTEGER;
ALTER TABLE snapshots ADD COLUMN row_sum INTEGER;
ALTER TABLE policies ADD COLUMN row_sum INTEGER;
ALTER TABLE images ADD COLUMN row_sum INTEGER;
ALTER TABLE origins ADD COLUMN row_sum INTEGER;
ALTER TABLE carry ADD COLUMN row_sum INTEGER;
ALTER TABLE operations ADD COLUMN row_sum INTEGER;

-- For the other tables their own indexes tell of rows that are lost: so that these have one.
CREATE INDEX carry_rows ON carry (disk, page, row_sum);
CREATE INDEX origins_rows ON origins (path, row_sum);
