package persistent

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/stdlib"
	_ "modernc.org/sqlite" // the driver "sqlite"

	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
)

// SQLStore keeps sessions in a table of a database, which it makes if it is not
// there:
//
//	context, id  bytes, the primary key
//	version      a number that grows
//	expires      milliseconds since 1970, 0 for never; indexed
//	data         the record
type SQLStore struct {
	db    *sql.DB
	table string
	bytes string // the database's type for bytes
	place func(n int) string
	ready chan struct{} // holds a token while the table is not there
	done  chan struct{} // closed when it is
}

// newSQLStore returns a store in an open database, which it closes.
func newSQLStore(db *sql.DB, table, bytes string, place func(int) string, connections int) *SQLStore {
	db.SetMaxOpenConns(connections)
	db.SetMaxIdleConns(connections)
	db.SetConnMaxIdleTime(5 * time.Minute)
	s := &SQLStore{db: db, table: table, bytes: bytes, place: place, ready: make(chan struct{}, 1), done: make(chan struct{})}
	s.ready <- struct{}{}
	return s
}

// NewSQLite returns a store in a SQLite file; several nodes of one machine may
// share it.
func NewSQLite(file, table string) (*SQLStore, error) {
	// Writers wait for each other; a write-ahead log lets readers go on, and
	// loses nothing that was committed when a process is killed.
	dsn := "file:" + (&url.URL{Path: file}).EscapedPath() +
		"?_pragma=busy_timeout(5000)&_pragma=journal_mode(WAL)&_pragma=synchronous(NORMAL)&_txlock=immediate"
	db, err := sql.Open("sqlite", dsn)
	if err != nil {
		return nil, fmt.Errorf("persistent: sqlite: %w", err)
	}
	return newSQLStore(db, table, "BLOB", func(int) string { return "?" }, 4), nil
}

// NewPostgres returns a store in a PostgreSQL database, given by a URL or by
// key=value words. A password is added to what they say.
func NewPostgres(dsn, password, table string, connections int) (*SQLStore, error) {
	c, err := pgx.ParseConfig(dsn)
	if err != nil {
		return nil, errors.New("persistent: dsn: it is neither a URL like postgres://user@host/database nor words like host=… dbname=…")
	}
	if password != "" {
		c.Password = password
	}
	return newSQLStore(stdlib.OpenDB(*c), table, "BYTEA", func(n int) string { return "$" + strconv.Itoa(n) }, connections), nil
}

// query fills in the table, the type of bytes, and the places of arguments.
func (s *SQLStore) query(text string) string {
	text = strings.NewReplacer("{table}", s.table, "{bytes}", s.bytes).Replace(text)
	var b strings.Builder
	for n := 1; ; n++ {
		before, after, ok := strings.Cut(text, "?")
		b.WriteString(before)
		if !ok {
			return b.String()
		}
		b.WriteString(s.place(n))
		text = after
	}
}

// prepare makes the table.
func (s *SQLStore) prepare(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	select {
	case <-s.done:
		return nil
	case <-s.ready:
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case <-s.done:
		return nil
	default:
	}
	// Whoever may not make tables finds it made.
	row := s.db.QueryRowContext(ctx, s.query(`SELECT COUNT(*) FROM {table} WHERE version < 0`))
	var n int
	err := row.Scan(&n)
	if err != nil {
		for _, q := range []string{
			`CREATE TABLE IF NOT EXISTS {table} (context {bytes} NOT NULL, id {bytes} NOT NULL, version BIGINT NOT NULL,
				expires BIGINT NOT NULL, data {bytes} NOT NULL, PRIMARY KEY (context, id))`,
			`CREATE INDEX IF NOT EXISTS {table}_expires ON {table} (expires)`,
		} {
			if _, err = s.db.ExecContext(ctx, s.query(q)); err != nil {
				break
			}
		}
		if err != nil {
			// Two nodes may have made it at the same time.
			if again := s.db.QueryRowContext(ctx, s.query(`SELECT COUNT(*) FROM {table} WHERE version < 0`)).Scan(&n); again == nil {
				err = nil
			}
		}
	}
	if err != nil {
		s.ready <- struct{}{}
		return fmt.Errorf("persistent: table %s: %w", s.table, err)
	}
	close(s.done)
	return nil
}

// Load implements core.Store.
func (s *SQLStore) Load(ctx context.Context, key session.Key) (it core.StoreItem, ok bool, err error) {
	if err := s.prepare(ctx); err != nil {
		return it, false, err
	}
	var version, expires int64
	err = s.db.QueryRowContext(ctx, s.query(`SELECT version, expires, data FROM {table} WHERE context = ? AND id = ?`),
		[]byte(key.Context), []byte(key.ID)).Scan(&version, &expires, &it.Data)
	switch {
	case errors.Is(err, sql.ErrNoRows):
		return core.StoreItem{}, false, nil
	case err != nil:
		return core.StoreItem{}, false, fmt.Errorf("persistent: %w", err)
	}
	it.Version = versionOf(uint64(version))
	if expires != 0 {
		it.Expires = time.UnixMilli(expires)
		if !it.Expires.After(time.Now()) {
			return core.StoreItem{}, false, nil
		}
	}
	return it, true, nil
}

// Save implements core.Store.
func (s *SQLStore) Save(ctx context.Context, key session.Key, item core.StoreItem, prev core.StoreVersion) (core.StoreVersion, error) {
	if err := s.prepare(ctx); err != nil {
		return "", err
	}
	now := time.Now()
	// Versions do not repeat, also when an item expires and begins anew.
	next := uint64(now.UnixMicro())
	var res sql.Result
	var err error
	if prev == "" {
		res, err = s.db.ExecContext(ctx, s.query(`INSERT INTO {table} (context, id, version, expires, data) VALUES (?, ?, ?, ?, ?)
			ON CONFLICT (context, id) DO UPDATE SET version = excluded.version, expires = excluded.expires, data = excluded.data
			WHERE {table}.expires <> 0 AND {table}.expires <= ?`),
			[]byte(key.Context), []byte(key.ID), int64(next), millis(item.Expires), item.Data, now.UnixMilli())
	} else {
		have, perr := strconv.ParseUint(string(prev), 10, 63)
		if perr != nil {
			return "", core.ErrStoreConflict
		}
		next = max(next, have+1)
		res, err = s.db.ExecContext(ctx, s.query(`UPDATE {table} SET version = ?, expires = ?, data = ?
			WHERE context = ? AND id = ? AND version = ? AND (expires = 0 OR expires > ?)`),
			int64(next), millis(item.Expires), item.Data, []byte(key.Context), []byte(key.ID), int64(have), now.UnixMilli())
	}
	if err != nil {
		return "", fmt.Errorf("persistent: %w", err)
	}
	n, err := res.RowsAffected()
	switch {
	case err != nil:
		return "", fmt.Errorf("persistent: %w", err)
	case n == 0:
		return "", core.ErrStoreConflict
	}
	return versionOf(next), nil
}

// exec runs a statement.
func (s *SQLStore) exec(ctx context.Context, q string, args ...any) (int64, error) {
	if err := s.prepare(ctx); err != nil {
		return 0, err
	}
	res, err := s.db.ExecContext(ctx, s.query(q), args...)
	if err != nil {
		return 0, fmt.Errorf("persistent: %w", err)
	}
	n, err := res.RowsAffected()
	if err != nil {
		return 0, fmt.Errorf("persistent: %w", err)
	}
	return n, nil
}

// Touch implements core.Store.
func (s *SQLStore) Touch(ctx context.Context, key session.Key, expires time.Time) error {
	_, err := s.exec(ctx, `UPDATE {table} SET expires = ? WHERE context = ? AND id = ? AND (expires = 0 OR expires > ?)`,
		millis(expires), []byte(key.Context), []byte(key.ID), time.Now().UnixMilli())
	return err
}

// Delete implements core.Store.
func (s *SQLStore) Delete(ctx context.Context, key session.Key) error {
	_, err := s.exec(ctx, `DELETE FROM {table} WHERE context = ? AND id = ?`, []byte(key.Context), []byte(key.ID))
	return err
}

// List implements core.Store.
func (s *SQLStore) List(ctx context.Context, limit int, each func(session.Key)) error {
	if err := s.prepare(ctx); err != nil {
		return err
	}
	rows, err := s.db.QueryContext(ctx, s.query(`SELECT context, id FROM {table} WHERE expires = 0 OR expires > ? LIMIT ?`), time.Now().UnixMilli(), limit)
	if err != nil {
		return fmt.Errorf("persistent: %w", err)
	}
	defer rows.Close()
	for rows.Next() {
		var name, id []byte
		if err := rows.Scan(&name, &id); err != nil {
			return fmt.Errorf("persistent: %w", err)
		}
		each(session.Key{Context: string(name), ID: string(id)})
	}
	if err := rows.Err(); err != nil {
		return fmt.Errorf("persistent: %w", err)
	}
	return nil
}

// Sweep implements core.StoreSweeper.
func (s *SQLStore) Sweep(ctx context.Context, now time.Time, limit int) (int, error) {
	n, err := s.exec(ctx, `DELETE FROM {table} WHERE (context, id) IN
		(SELECT context, id FROM {table} WHERE expires <> 0 AND expires <= ? LIMIT ?)`, now.UnixMilli(), limit)
	return int(n), err
}

// Close implements core.Store.
func (s *SQLStore) Close() error { return s.db.Close() }

var (
	_ core.Store        = (*SQLStore)(nil)
	_ core.StoreSweeper = (*SQLStore)(nil)
)
