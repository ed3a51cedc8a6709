package watch

import (
	"archive/zip"
	"bytes"
	"compress/flate"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

var testLimits = limits{entries: 100, file: 2 << 20, total: 3 << 20}

// tryArchive opens and unpacks an archive as the deployer does. It returns the
// error, and fails the test if anything lies outside of the directory.
func tryArchive(t testing.TB, data []byte, l limits) (contents, error) {
	t.Helper()
	parent := t.TempDir()
	dir := filepath.Join(parent, "files")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	zr, err := openArchive(bytes.NewReader(data), int64(len(data)), l)
	var c contents
	if err == nil {
		c, err = unpack(zr, root, l, nil)
	}
	entries, rerr := os.ReadDir(parent)
	if rerr != nil || len(entries) != 1 {
		t.Fatalf("outside of the directory: %v, %v", entries, rerr)
	}
	var size int64
	filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			t.Fatal(err)
		}
		if !e.IsDir() {
			fi, err := e.Info()
			if err != nil || !fi.Mode().IsRegular() {
				t.Fatalf("%s: %v, %v", path, fi, err)
			}
			size += fi.Size()
		}
		return nil
	})
	if size > l.total+1 {
		t.Fatalf("unpacked %d bytes", size)
	}
	return c, err
}

// header adds an entry with any header.
func header(t testing.TB, h *zip.FileHeader, data []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := zip.NewWriter(&b)
	f, err := w.CreateHeader(h)
	if err != nil {
		t.Fatal(err)
	}
	f.Write(data)
	w.Close()
	return b.Bytes()
}

func linkHeader() *zip.FileHeader {
	h := &zip.FileHeader{Name: "link"}
	h.SetMode(fs.ModeSymlink | 0o777)
	return h
}

// raw returns an archive whose entry has the given compressed data and declared
// sizes.
func raw(t testing.TB, compressed []byte, declared uint64) []byte {
	var b bytes.Buffer
	w := zip.NewWriter(&b)
	f, err := w.CreateRaw(&zip.FileHeader{
		Name: "bomb", Method: zip.Deflate,
		CompressedSize64: uint64(len(compressed)), UncompressedSize64: declared,
	})
	if err != nil {
		t.Fatal(err)
	}
	f.Write(compressed)
	w.Close()
	return b.Bytes()
}

func deflate(n int) []byte {
	var b bytes.Buffer
	w, _ := flate.NewWriter(&b, flate.DefaultCompression)
	zeros := make([]byte, 1<<16)
	for ; n > 0; n -= len(zeros) {
		w.Write(zeros)
	}
	w.Close()
	return b.Bytes()
}

// patched changes the local header of the first entry, or the central one.
func patched(data []byte, signature string, at int, with string) []byte {
	out := bytes.Clone(data)
	i := bytes.Index(out, []byte(signature))
	copy(out[i+at:], with)
	return out
}

// overlapping returns an archive with many entries in the directory that share
// the data of one.
func overlapping(t testing.TB, n int) []byte {
	data := war(t, "aaaa", strings.Repeat("x", 10_000))
	eocd := bytes.LastIndex(data, []byte("PK\x05\x06"))
	central := bytes.LastIndex(data, []byte("PK\x01\x02"))
	entry := data[central:eocd]
	out := bytes.Clone(data[:central])
	for range n {
		out = append(out, entry...)
	}
	end := bytes.Clone(data[eocd:])
	binary.LittleEndian.PutUint16(end[8:], uint16(n))
	binary.LittleEndian.PutUint16(end[10:], uint16(n))
	binary.LittleEndian.PutUint32(end[12:], uint32(n*len(entry)))
	return append(out, end...)
}

func TestBadArchives(t *testing.T) {
	good := war(t, "index.html", "hello", "a/b/c", "x")
	many := make([]string, 0, 400)
	for i := range 101 {
		many = append(many, fmt.Sprint(i), "x")
	}
	encrypted := &zip.FileHeader{Name: "a", Flags: 1}
	huge := make([]byte, 9<<18) // does not compress
	for i, r := 0, rand.New(rand.NewPCG(1, 2)); i < len(huge); i += 8 {
		binary.LittleEndian.PutUint64(huge[i:], r.Uint64())
	}
	for _, c := range []struct {
		name string
		data []byte
		want string // a part of the error; empty for none
	}{
		{"good", good, ""},
		{"with directories", war(t, "a/", "", "a/b", "x", "c/", ""), ""},
		{"empty file", nil, "not a complete zip"},
		{"DP-05 truncated by one", good[:len(good)-1], "not a complete zip"},
		{"DP-05 truncated in half", good[:len(good)/2], "not a complete zip"},
		{"DP-05 other name in the local header", patched(good, "PK\x03\x04", 30, "XXXXX.html"), "another name"},
		{"DP-05 other method in the local header", patched(good, "PK\x03\x04", 8, "\x00"), "another name or method"},
		{"DP-05 wrong checksum", patched(good, "PK\x01\x02", 16, "\x01\x02\x03\x04"), "checksum"},
		{"DP-02 same name", war(t, "a", "1", "a", "2"), "is there twice"},
		{"DP-02 letter case", war(t, "Index.html", "1", "index.HTML", "2"), "letter case"},
		{"DP-02 letter case of a directory", war(t, "Web/a", "1", "web/b", "2"), "letter case"},
		{"DP-02 special letter case", war(t, "ſ", "1", "S", "2"), "letter case"},
		{"file and directory", war(t, "a", "1", "a/b", "2"), "both a file and a directory"},
		{"directory and file", war(t, "a/b", "1", "a", "2"), "both a file and a directory"},
		{"same directory twice", war(t, "a/", "", "a/", ""), "is there twice"},
		{"parent", war(t, "../evil", "x"), "stay inside"},
		{"parent within", war(t, "a/../../evil", "x"), "stay inside"},
		{"absolute", war(t, "/etc/evil", "x"), "stay inside"},
		{"drive", war(t, "c:evil", "x"), "colon"},
		{"backslash", war(t, `..\evil`, "x"), "backslash"},
		{"dot", war(t, "./a", "x"), "stay inside"},
		{"empty part", war(t, "a//b", "x"), "stay inside"},
		{"only a slash", war(t, "/", ""), "stay inside"},
		{"NUL", war(t, "a\x00b", "x"), "no plain text"},
		{"newline", war(t, "a\nb", "x"), "no plain text"},
		{"no UTF-8", war(t, "a\xffb", "x"), "no plain text"},
		{"long name", war(t, strings.Repeat("a/", 600)+"b", "x"), "bytes"},
		{"long part", war(t, strings.Repeat("a", 256), "x"), "part longer"},
		{"deep", war(t, strings.Repeat("a/", 64)+"b", "x"), "deeper"},
		{"symbolic link", header(t, linkHeader(), []byte("/etc/passwd")), "neither a file"},
		{"encrypted", header(t, encrypted, []byte("x")), "encrypted"},
		{"unknown method", patched(patched(good, "PK\x01\x02", 10, "\x0e"), "PK\x03\x04", 8, "\x0e"), "method 14"},
		{"DP-04 too many entries", war(t, many...), "100 are allowed"},
		{"DP-04 huge file", war(t, "a", string(huge)), "2097152 are allowed"},
		{"DP-04 huge in sum", war(t, "a", string(huge[:5<<18]), "b", string(huge[:5<<18]), "c", string(huge[:5<<18])), "max_unpacked"},
		{"DP-04 ratio", raw(t, deflate(2<<20), 2<<20), "more than 200 times"},
		{"DP-04 lies about its size", raw(t, deflate(4<<20), 1000), "not a valid zip"},
		{"DP-04 shorter than it says", raw(t, deflate(1<<16), 1<<17), "unexpected EOF"},
		{"DP-04 entries share data", overlapping(t, 2), "is there twice"},
		{"DP-04 huge directory", overlapping(t, 60_000), "max_entries"},
	} {
		_, err := tryArchive(t, c.data, testLimits)
		var bad *archiveError
		switch {
		case c.want == "" && err != nil:
			t.Errorf("%s: %v", c.name, err)
		case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
			t.Errorf("%s: got %v, want ...%s...", c.name, err, c.want)
		case c.want != "" && !errors.As(err, &bad):
			t.Errorf("%s: %v is not counted as a fault of the archive", c.name, err)
		}
	}
}

func TestOverlapIsFound(t *testing.T) {
	// Two entries with names of their own whose data is the same: the second
	// directory entry points into the first one's data.
	data := overlapping(t, 2)
	second := bytes.LastIndex(data, []byte("PK\x01\x02"))
	copy(data[second+46:], "bbbb")
	_, err := tryArchive(t, data, testLimits)
	if err == nil || !strings.Contains(err.Error(), "another name") && !strings.Contains(err.Error(), "share data") {
		t.Errorf("got %v", err)
	}
}

func TestUnpackStops(t *testing.T) {
	data := war(t, "a", "x")
	zr, err := openArchive(bytes.NewReader(data), int64(len(data)), testLimits)
	if err != nil {
		t.Fatal(err)
	}
	root, err := os.OpenRoot(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	stop := make(chan struct{})
	close(stop)
	if _, err := unpack(zr, root, testLimits, stop); !errors.Is(err, errStopped) {
		t.Errorf("got %v", err)
	}
}

// FuzzArchive unpacks arbitrary archives: whatever they are, nothing lies
// outside of the directory, and the bounds hold.
func FuzzArchive(f *testing.F) {
	f.Add(war(f, "index.html", "hello", "a/b", "x", "c/", ""))
	f.Add(war(f, "../x", "y"))
	f.Add(header(f, linkHeader(), []byte("/etc")))
	f.Add(overlapping(f, 3))
	f.Add(raw(f, deflate(1<<16), 10))
	f.Fuzz(func(t *testing.T, data []byte) {
		l := limits{entries: 10, file: 1 << 16, total: 1 << 17}
		c, err := tryArchive(t, data, l)
		if err == nil && (c.Bytes > l.total || c.Files > l.entries) {
			t.Errorf("unpacked %+v", c)
		}
	})
}

func FuzzName(f *testing.F) {
	for _, s := range []string{"shop.war", "a#b##2.zip", "ROOT.war", "..#x.war"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, ok, err := parseName(s)
		if !ok || err != nil {
			return
		}
		if n.path != "" && (n.path[0] != '/' || !fs.ValidPath(n.path[1:])) {
			t.Errorf("%q gives the path %q", s, n.path)
		}
	})
}

func BenchmarkUnpack(b *testing.B) {
	b.ReportAllocs()
	var files []string
	for i := range 200 {
		files = append(files, fmt.Sprintf("WEB-INF/classes/c%d.class", i), strings.Repeat(fmt.Sprint(i, time.Hour), 1000))
	}
	data := war(b, files...)
	b.SetBytes(int64(len(data)))
	dir := b.TempDir()
	i := 0
	for b.Loop() {
		sub := filepath.Join(dir, fmt.Sprint(i))
		i++
		os.Mkdir(sub, 0o755)
		root, err := os.OpenRoot(sub)
		if err != nil {
			b.Fatal(err)
		}
		zr, err := openArchive(bytes.NewReader(data), int64(len(data)), limits{1000, 1 << 30, 1 << 30})
		if err == nil {
			_, err = unpack(zr, root, limits{1000, 1 << 30, 1 << 30}, nil)
		}
		if err != nil && err != io.EOF {
			b.Fatal(err)
		}
		root.Close()
	}
}
