package persistent

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
)

// FileStore keeps every session in a file of its own, below one folder:
//
//	<folder>/key               the key of the MACs, if none is configured
//	<folder>/ab/<hash>.session hash is SHA-256 of context and id, ab its first byte
//	<folder>/ab/lock           locked by whoever changes a file of that folder
//
// A file is written beside its place, synced and renamed, so that it is always
// whole; its contents are authenticated together with the key of the session,
// so that a file which somebody else has written, damaged or moved is refused.
// The folder may be shared by several nodes if its file system has locks (flock)
// that they share.
//
// The format, all numbers big endian:
//
//	4  "LHS1"
//	8  version, counts the writes
//	8  expiry, milliseconds since 1970; 0 is never
//	2+ length and bytes of the context's name
//	2+ length and bytes of the id
//	4+ length and bytes of the record
//	32 HMAC-SHA-256 of everything before it
type FileStore struct {
	dir   string
	mac   []byte
	sync  bool
	ready chan struct{} // holds a token while the folder is not prepared
	done  chan struct{} // closed when it is
}

const (
	fileMagic  = "LHS1"
	fileSuffix = ".session"
	tempPrefix = ".new-"
	macSize    = sha256.Size
	// maxFile bounds what is read of a file, in bytes.
	maxFile = session.MaxSize*2 + 64<<10
	// lockPause is the time between attempts to get a folder's lock.
	lockPause = 2 * time.Millisecond
	// tempAge is how old a file must be that was not renamed, to be removed.
	tempAge = 10 * time.Minute
)

// NewFileStore returns a store in dir, which is made when it is first used.
// secret is the key of the MACs; if it is empty, one is made and kept in the
// folder, which protects from damage only, and not from those who can read the
// folder. With sync every write reaches the disk before Save returns.
func NewFileStore(dir string, secret []byte, sync bool) *FileStore {
	f := &FileStore{dir: dir, sync: sync, ready: make(chan struct{}, 1), done: make(chan struct{})}
	if len(secret) > 0 {
		h := sha256.Sum256(append([]byte("longhouse session file\x00"), secret...))
		f.mac = h[:]
	}
	f.ready <- struct{}{}
	return f
}

// prepare makes the folder and reads its key, once. It fails when ctx has ended.
func (f *FileStore) prepare(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	select {
	case <-f.done:
		return nil
	case <-f.ready:
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case <-f.done: // another one has done it
		return nil
	default:
	}
	err := os.MkdirAll(f.dir, 0o700)
	if err == nil && f.mac == nil {
		f.mac, err = folderKey(filepath.Join(f.dir, "key"))
	}
	if err != nil {
		f.ready <- struct{}{}
		return fmt.Errorf("persistent: session folder %s: %w", f.dir, err)
	}
	close(f.done)
	return nil
}

// folderKey reads the key, or makes one. Of several nodes that make one at the
// same time, the first wins.
func folderKey(path string) ([]byte, error) {
	for range 2 {
		b, err := os.ReadFile(path)
		switch {
		case err == nil && len(b) == macSize:
			return b, nil
		case err == nil:
			return nil, fmt.Errorf("%s has %d bytes, not %d: it is no key; remove it, and with it all stored sessions", path, len(b), macSize)
		case !errors.Is(err, fs.ErrNotExist):
			return nil, err
		}
		key := make([]byte, macSize)
		if _, err := rand.Read(key); err != nil {
			return nil, err
		}
		temp := path + tempPrefix + hex.EncodeToString(key[:4])
		if err := writeFile(temp, key, true); err != nil {
			return nil, err
		}
		err = os.Link(temp, path) // fails if there is one
		_ = os.Remove(temp)
		if err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, err
		}
	}
	return os.ReadFile(path)
}

func (f *FileStore) path(key session.Key) string {
	h := sha256.New()
	h.Write([]byte(key.Context))
	h.Write([]byte{0})
	h.Write([]byte(key.ID))
	name := hex.EncodeToString(h.Sum(nil))
	return filepath.Join(f.dir, name[:2], name+fileSuffix)
}

// fileItem is the content of a file.
type fileItem struct {
	key     session.Key
	version uint64
	expires int64
	data    []byte
}

func (s *fileItem) encode(mac []byte) []byte {
	b := make([]byte, 0, len(fileMagic)+8+8+2+len(s.key.Context)+2+len(s.key.ID)+4+len(s.data)+macSize)
	b = append(b, fileMagic...)
	b = binary.BigEndian.AppendUint64(b, s.version)
	b = binary.BigEndian.AppendUint64(b, uint64(s.expires))
	for _, t := range []string{s.key.Context, s.key.ID} {
		b = append(binary.BigEndian.AppendUint16(b, uint16(len(t))), t...)
	}
	b = append(binary.BigEndian.AppendUint32(b, uint32(len(s.data))), s.data...)
	return sign(b, mac)
}

// sign appends the MAC of b.
func sign(b, mac []byte) []byte {
	h := hmac.New(sha256.New, mac)
	h.Write(b)
	return h.Sum(b)
}

// decodeFile checks and splits the content of a file.
func decodeFile(b, mac []byte) (*fileItem, error) {
	bad := func(what string) (*fileItem, error) {
		return nil, fmt.Errorf("%w: %s", core.ErrStoreCorrupt, what)
	}
	if len(b) < len(fileMagic)+macSize || string(b[:len(fileMagic)]) != fileMagic {
		return bad("it does not begin like a session file")
	}
	body, sum := b[:len(b)-macSize], b[len(b)-macSize:]
	h := hmac.New(sha256.New, mac)
	h.Write(body)
	if !hmac.Equal(sum, h.Sum(nil)) {
		return bad("its MAC is wrong: it was damaged, or written with another key")
	}
	in := body[len(fileMagic):]
	take := func(n int) (part []byte) {
		if in == nil || n > len(in) {
			in = nil
			return make([]byte, min(n, 8))
		}
		part, in = in[:n:n], in[n:]
		return part
	}
	s := &fileItem{}
	s.version = binary.BigEndian.Uint64(take(8))
	s.expires = int64(binary.BigEndian.Uint64(take(8)))
	s.key.Context = string(take(int(binary.BigEndian.Uint16(take(2)))))
	s.key.ID = string(take(int(binary.BigEndian.Uint16(take(2)))))
	s.data = take(int(binary.BigEndian.Uint32(take(4))))
	if in == nil || len(in) != 0 {
		return bad("its lengths do not agree")
	}
	return s, nil
}

func (s *fileItem) expired(now time.Time) bool {
	return s.expires != 0 && s.expires <= now.UnixMilli()
}

// read returns what a file holds; nil if there is none.
func (f *FileStore) read(path string) (*fileItem, error) {
	file, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer file.Close()
	b, err := io.ReadAll(io.LimitReader(file, maxFile+1))
	if err != nil {
		return nil, err
	}
	if len(b) > maxFile {
		return nil, fmt.Errorf("%w: %s has more than %d bytes", core.ErrStoreCorrupt, path, maxFile)
	}
	s, err := decodeFile(b, f.mac)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return s, nil
}

// get reads the file of a key; nil if there is none that counts.
func (f *FileStore) get(key session.Key) (*fileItem, error) {
	s, err := f.read(f.path(key))
	if s == nil || err != nil {
		return nil, err
	}
	if s.key != key {
		return nil, fmt.Errorf("%w: the file belongs to another session", core.ErrStoreCorrupt)
	}
	if s.expired(time.Now()) {
		return nil, nil
	}
	return s, nil
}

func (s *fileItem) item() core.StoreItem {
	it := core.StoreItem{Data: s.data, Version: versionOf(s.version)}
	if s.expires != 0 {
		it.Expires = time.UnixMilli(s.expires)
	}
	return it
}

func versionOf(n uint64) core.StoreVersion { return core.StoreVersion(strconv.FormatUint(n, 10)) }

func millis(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixMilli()
}

// Load implements core.Store.
func (f *FileStore) Load(ctx context.Context, key session.Key) (core.StoreItem, bool, error) {
	if err := f.prepare(ctx); err != nil {
		return core.StoreItem{}, false, err
	}
	s, err := f.get(key)
	if s == nil || err != nil {
		return core.StoreItem{}, false, err
	}
	return s.item(), true, nil
}

// change runs c on what is stored of key (nil for nothing), with the folder
// locked.
func (f *FileStore) change(ctx context.Context, key session.Key, c func(path string, s *fileItem) error) error {
	if err := f.prepare(ctx); err != nil {
		return err
	}
	path := f.path(key)
	if err := os.Mkdir(filepath.Dir(path), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	unlock, err := lock(ctx, filepath.Join(filepath.Dir(path), "lock"))
	if err != nil {
		return err
	}
	defer unlock()
	s, err := f.get(key)
	if err != nil && !errors.Is(err, core.ErrStoreCorrupt) {
		return err
	}
	return c(path, s)
}

// Save implements core.Store.
func (f *FileStore) Save(ctx context.Context, key session.Key, item core.StoreItem, prev core.StoreVersion) (next core.StoreVersion, err error) {
	if len(key.Context) > session.MaxContext || len(key.ID) > session.MaxID {
		return "", fmt.Errorf("persistent: the key of a session is too long")
	}
	err = f.change(ctx, key, func(path string, s *fileItem) error {
		var have core.StoreVersion
		// Versions of one file do not repeat: what expired and begins anew is
		// told apart by the clock.
		version := uint64(time.Now().UnixMicro())
		if s != nil {
			have, version = versionOf(s.version), max(version, s.version+1)
		}
		if have != prev {
			return core.ErrStoreConflict
		}
		next = versionOf(version)
		return f.put(path, &fileItem{key: key, version: version, expires: millis(item.Expires), data: item.Data})
	})
	return next, err
}

// put writes a file beside its place and moves it there.
func (f *FileStore) put(path string, s *fileItem) error {
	dir, name := filepath.Split(path)
	temp := filepath.Join(dir, tempPrefix+strings.TrimSuffix(name, fileSuffix))
	err := writeFile(temp, s.encode(f.mac), f.sync)
	if err == nil {
		err = os.Rename(temp, path)
	}
	if err != nil {
		_ = os.Remove(temp)
		return fmt.Errorf("persistent: %w", err)
	}
	if f.sync {
		return syncFolder(dir)
	}
	return nil
}

func writeFile(path string, b []byte, sync bool) error {
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(file, bytes.NewReader(b))
	if err == nil && sync {
		err = file.Sync()
	}
	return errors.Join(err, file.Close())
}

// Touch implements core.Store.
func (f *FileStore) Touch(ctx context.Context, key session.Key, expires time.Time) error {
	return f.change(ctx, key, func(path string, s *fileItem) error {
		if s == nil || s.expires == millis(expires) {
			return nil
		}
		s.expires = millis(expires)
		return f.put(path, s)
	})
}

// Delete implements core.Store.
func (f *FileStore) Delete(ctx context.Context, key session.Key) error {
	return f.change(ctx, key, func(path string, _ *fileItem) error {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	})
}

// List implements core.Store. Files that cannot be trusted are left out.
func (f *FileStore) List(ctx context.Context, limit int, each func(session.Key)) error {
	if err := f.prepare(ctx); err != nil {
		return err
	}
	n := 0
	return f.walk(ctx, func(path string) error {
		s, err := f.read(path)
		if errors.Is(err, core.ErrStoreCorrupt) || s == nil && err == nil || err == nil && s.expired(time.Now()) {
			return nil
		}
		if err != nil {
			return err
		}
		if n++; n > limit {
			return fs.SkipAll
		}
		each(s.key)
		return nil
	})
}

// walk calls each with all session files, until it returns an error.
func (f *FileStore) walk(ctx context.Context, each func(path string) error) error {
	err := filepath.WalkDir(f.dir, func(path string, d fs.DirEntry, err error) error {
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil
		case err != nil:
			return err
		case ctx.Err() != nil:
			return ctx.Err()
		case !d.Type().IsRegular():
			return nil
		case strings.HasPrefix(d.Name(), tempPrefix):
			// A node has died while it wrote this.
			if info, err := d.Info(); err == nil && time.Since(info.ModTime()) > tempAge {
				_ = os.Remove(path)
			}
			return nil
		case !strings.HasSuffix(d.Name(), fileSuffix):
			return nil
		}
		return each(path)
	})
	if err != nil {
		return fmt.Errorf("persistent: %w", err)
	}
	return nil
}

// Sweep implements core.StoreSweeper.
func (f *FileStore) Sweep(ctx context.Context, now time.Time, limit int) (n int, err error) {
	if err := f.prepare(ctx); err != nil {
		return 0, err
	}
	err = f.walk(ctx, func(path string) error {
		s, err := f.read(path)
		if err != nil || s == nil || !s.expired(now) {
			return nil // a damaged one is reported when it is asked for
		}
		unlock, err := lock(ctx, filepath.Join(filepath.Dir(path), "lock"))
		if err != nil {
			return err
		}
		defer unlock()
		// It may have been written again.
		if s, err = f.read(path); err != nil || s == nil || !s.expired(now) {
			return nil
		}
		if err := os.Remove(path); err != nil {
			return err
		}
		if n++; n >= limit {
			return fs.SkipAll
		}
		return nil
	})
	return n, err
}

// Close implements core.Store.
func (f *FileStore) Close() error { return nil }

var (
	_ core.Store        = (*FileStore)(nil)
	_ core.StoreSweeper = (*FileStore)(nil)
)
