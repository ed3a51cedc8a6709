package watch

import (
	"archive/zip"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"
)

const (
	maxNameLength = 1024 // bytes of an entry's path
	maxPartLength = 255  // bytes of one part of it, as file systems have
	maxDepth      = 64
	// maxRatio bounds how much larger than in the archive an entry may be.
	maxRatio = 200
	// ratioFrom is the size in bytes from which maxRatio holds: small files of
	// zeros harm nobody.
	ratioFrom = 1 << 20
	// directoryPerEntry bounds the central directory, in bytes per entry that
	// is allowed, before it is read into memory.
	directoryPerEntry = 512
	directoryBase     = 1 << 20
)

// limits bound what an archive may unpack to.
type limits struct {
	entries int
	file    int64 // bytes of one unpacked file
	total   int64 // bytes of all of them
}

// contents counts what was unpacked.
type contents struct {
	Files int   `json:"files"`
	Bytes int64 `json:"bytes"`
}

// archiveError is a fault of the archive: trying again is pointless until it
// changes.
type archiveError struct{ err error }

func (e *archiveError) Error() string { return e.err.Error() }
func (e *archiveError) Unwrap() error { return e.err }

func badArchive(format string, args ...any) error {
	return &archiveError{fmt.Errorf(format, args...)}
}

var errDirectoryTooLarge = errors.New("its directory is too large")

// budgetReader fails when too much has been read through it.
type budgetReader struct {
	r    io.ReaderAt
	left int64
}

func (b *budgetReader) ReadAt(p []byte, off int64) (int, error) {
	if b.left -= int64(len(p)); b.left < 0 {
		return 0, errDirectoryTooLarge
	}
	return b.r.ReadAt(p, off)
}

// openArchive reads the central directory of a zip archive and checks every
// entry, without unpacking anything.
func openArchive(r io.ReaderAt, size int64, l limits) (*zip.Reader, error) {
	budget := &budgetReader{r, directoryBase + int64(l.entries)*directoryPerEntry}
	zr, err := zip.NewReader(budget, size)
	switch {
	case errors.Is(err, errDirectoryTooLarge):
		return nil, badArchive("its directory lists too much; %d entries are allowed (max_entries)", l.entries)
	case err != nil:
		return nil, badArchive("not a complete zip archive: %w (is it still being copied?)", err)
	}
	budget.left = 1 << 62 // the entries have bounds of their own
	if len(zr.File) > l.entries {
		return nil, badArchive("it has %d entries; %d are allowed (max_entries)", len(zr.File), l.entries)
	}
	if err := checkEntries(zr, l); err != nil {
		return nil, err
	}
	return zr, checkPlaces(r, zr)
}

// checkEntries checks what the central directory says.
func checkEntries(zr *zip.Reader, l limits) error {
	names := names{}
	var total uint64
	for _, f := range zr.File {
		if err := checkName(f.Name); err != nil {
			return err
		}
		dir := strings.HasSuffix(f.Name, "/")
		if err := names.add(strings.TrimSuffix(f.Name, "/"), dir); err != nil {
			return err
		}
		mode := f.Mode()
		switch {
		case dir != mode.IsDir(), !dir && !mode.IsRegular():
			return badArchive("entry %q is neither a file nor a directory but %s", f.Name, mode.Type())
		case f.Flags&1 != 0:
			return badArchive("entry %q is encrypted", f.Name)
		case f.Method != zip.Store && f.Method != zip.Deflate:
			return badArchive("entry %q is compressed by method %d; only stored and deflated ones are read", f.Name, f.Method)
		case dir && f.UncompressedSize64 != 0:
			return badArchive("directory %q has contents", f.Name)
		case f.UncompressedSize64 > uint64(l.file):
			return badArchive("entry %q unpacks to %d bytes; %d are allowed", f.Name, f.UncompressedSize64, l.file)
		case f.UncompressedSize64 > ratioFrom && f.UncompressedSize64/maxRatio > f.CompressedSize64:
			return badArchive("entry %q unpacks to more than %d times its size", f.Name, maxRatio)
		}
		if total += f.UncompressedSize64; total > uint64(l.total) {
			return badArchive("it unpacks to more than %d bytes (max_unpacked)", l.total)
		}
	}
	return nil
}

// checkName refuses names that could leave the directory, or mean something
// else on another system.
func checkName(name string) error {
	trimmed := strings.TrimSuffix(name, "/")
	switch {
	case len(name) > maxNameLength:
		return badArchive("an entry's name has %d bytes; %d are allowed", len(name), maxNameLength)
	case !utf8.ValidString(name) || strings.ContainsFunc(name, unicode.IsControl):
		return badArchive("entry %q has a name that is no plain text", name)
	case strings.ContainsAny(name, `\:`):
		return badArchive(`entry %q has a backslash or a colon in its name`, name)
	case trimmed == "." || !fs.ValidPath(trimmed):
		return badArchive("entry %q would not stay inside its directory, or is not written plainly", name)
	case strings.Count(trimmed, "/") >= maxDepth:
		return badArchive("entry %q lies deeper than %d directories", name, maxDepth)
	}
	for part := range strings.SplitSeq(trimmed, "/") {
		if len(part) > maxPartLength {
			return badArchive("entry %q has a part longer than %d bytes", name, maxPartLength)
		}
	}
	return nil
}

// names finds entries that fall on one file, also where letter case does not
// count. It maps folded names to what was seen.
type names map[string]nameSeen

type nameSeen struct {
	name     string
	dir      bool
	explicit bool // has an entry; not only as the parent of one
}

func (n names) add(name string, dir bool) error {
	if err := n.put(name, dir, true); err != nil {
		return err
	}
	for p := path.Dir(name); p != "."; p = path.Dir(p) {
		if old, ok := n[fold(p)]; ok && old.name == p && old.dir {
			return nil // its parents are there too
		}
		if err := n.put(p, true, false); err != nil {
			return err
		}
	}
	return nil
}

func (n names) put(name string, dir, explicit bool) error {
	key := fold(name)
	old, ok := n[key]
	switch {
	case !ok:
	case old.name != name:
		return badArchive("entries %q and %q differ only in letter case", old.name, name)
	case old.dir != dir:
		return badArchive("entry %q is both a file and a directory", name)
	case old.explicit && explicit:
		return badArchive("entry %q is there twice", name)
	}
	n[key] = nameSeen{name, dir, old.explicit || explicit}
	return nil
}

// fold maps names that differ only in letter case to one. Going up first joins
// letters with several lower cases.
func fold(s string) string { return strings.ToLower(strings.ToUpper(s)) }

// checkPlaces checks that the entries' data do not overlap, and that the header
// in front of each says what the central directory says.
func checkPlaces(r io.ReaderAt, zr *zip.Reader) error {
	type place struct{ from, to int64 }
	places := make([]place, 0, len(zr.File))
	for _, f := range zr.File {
		from, err := f.DataOffset()
		if err != nil {
			return badArchive("entry %q: %w", f.Name, err)
		}
		header, err := checkHeader(r, f, from)
		if err != nil {
			return err
		}
		places = append(places, place{header, from + int64(f.CompressedSize64)})
	}
	slices.SortFunc(places, func(a, b place) int { return int(max(-1, min(1, a.from-b.from))) })
	for i := 1; i < len(places); i++ {
		if places[i].from < places[i-1].to {
			return badArchive("entries share data (an archive that unpacks to far more than its size)")
		}
	}
	return nil
}

const (
	localHeader    = 30
	localSignature = "PK\x03\x04"
	// maxExtra is how far before the data its header may start.
	maxExtra = localHeader + 2*65535
)

// checkHeader finds the local header whose data starts at offset data, compares
// it with the central directory and returns its place.
func checkHeader(r io.ReaderAt, f *zip.File, data int64) (int64, error) {
	// Package zip has found the header but does not tell where. It ends at data.
	for _, window := range []int64{localHeader + int64(len(f.Name)) + 256, maxExtra} {
		window = min(window, data)
		b := make([]byte, window)
		if _, err := r.ReadAt(b, data-window); err != nil && !errors.Is(err, io.EOF) {
			return 0, fmt.Errorf("read the header of entry %q: %w", f.Name, err)
		}
		for i := bytes.LastIndex(b, []byte(localSignature)); i >= 0; i = bytes.LastIndex(b[:i], []byte(localSignature)) {
			h := b[i:]
			if len(h) < localHeader {
				continue
			}
			nameLen, extraLen := int(binary.LittleEndian.Uint16(h[26:])), int(binary.LittleEndian.Uint16(h[28:]))
			if localHeader+nameLen+extraLen != len(h) {
				continue
			}
			method := binary.LittleEndian.Uint16(h[8:])
			if string(h[localHeader:localHeader+nameLen]) != f.Name || method != f.Method {
				return 0, badArchive("entry %q has another name or method in its own header than in the archive's directory", f.Name)
			}
			return data - int64(len(h)), nil
		}
	}
	return 0, badArchive("entry %q has no header in front of its data", f.Name)
}

// unpack writes the entries of an archive that openArchive has accepted into
// root, which must be empty. Sizes are bounded by what is really unpacked.
func unpack(zr *zip.Reader, root *os.Root, l limits, stop <-chan struct{}) (contents, error) {
	var c contents
	for _, f := range zr.File {
		select {
		case <-stop:
			return c, errStopped
		default:
		}
		if strings.HasSuffix(f.Name, "/") {
			if err := root.MkdirAll(strings.TrimSuffix(f.Name, "/"), 0o755); err != nil {
				return c, fmt.Errorf("unpack %q: %w", f.Name, err)
			}
			continue
		}
		n, err := unpackFile(f, root, min(int64(f.UncompressedSize64), l.total-c.Bytes))
		c.Bytes += n
		if err != nil {
			return c, err
		}
		c.Files++
	}
	return c, nil
}

func unpackFile(f *zip.File, root *os.Root, limit int64) (n int64, err error) {
	if dir := path.Dir(f.Name); dir != "." {
		if err := root.MkdirAll(dir, 0o755); err != nil {
			return 0, fmt.Errorf("unpack %q: %w", f.Name, err)
		}
	}
	src, err := f.Open()
	if err != nil {
		return 0, badArchive("entry %q: %w", f.Name, err)
	}
	defer src.Close()
	dst, err := root.OpenFile(f.Name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return 0, fmt.Errorf("unpack %q: %w", f.Name, err)
	}
	defer func() {
		if cerr := dst.Close(); err == nil && cerr != nil {
			err = fmt.Errorf("unpack %q: %w", f.Name, cerr)
		}
	}()
	var readErr error
	n, err = io.Copy(dst, errorTrap{io.LimitReader(src, limit+1), &readErr})
	switch {
	case readErr != nil:
		return n, badArchive("entry %q: %w", f.Name, readErr)
	case err != nil:
		return n, fmt.Errorf("unpack %q: %w", f.Name, err)
	case n > limit:
		return n, badArchive("entry %q unpacks to more than it says, or than is allowed", f.Name)
	}
	return n, nil
}

// errorTrap keeps errors of reading apart from those of writing.
type errorTrap struct {
	r   io.Reader
	err *error
}

func (t errorTrap) Read(p []byte) (int, error) {
	n, err := t.r.Read(p)
	if err != nil && err != io.EOF {
		*t.err = err
	}
	return n, err
}
