package watch

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/longhouse-go/longhouse/core"
)

// journal is what is written down in the work directory. It is written before
// anything is handed to the node, so that a directory that it does not name is
// used by nobody.
type journal struct {
	Apps []record `json:"apps"`
	// Retired are directories that may be removed.
	Retired []string `json:"retired,omitempty"`
}

// record is one context path.
type record struct {
	Path string `json:"path"`
	// Serving is what the node has accepted; Staged is what it has been handed,
	// or is about to be.
	Serving *staged `json:"serving,omitempty"`
	Staged  *staged `json:"staged,omitempty"`
}

// staged is an archive that has been unpacked.
type staged struct {
	File     fingerprint `json:"file"`
	Version  string      `json:"version"`
	Digest   string      `json:"digest"`
	Dir      string      `json:"dir"` // name inside the directory of unpacked archives
	Contents contents    `json:"contents"`
}

// fingerprint tells whether a file has changed.
type fingerprint struct {
	Name string    `json:"name"`
	Size int64     `json:"size"`
	Time time.Time `json:"time"`
}

func (f fingerprint) equal(o fingerprint) bool {
	return f.Name == o.Name && f.Size == o.Size && f.Time.Equal(o.Time)
}

const (
	journalFile = "journal.json"
	// maxJournal bounds what is read back, in bytes.
	maxJournal = 16 << 20
)

// readJournal reads the journal of a work directory; a missing one is empty.
func readJournal(work *os.Root) (journal, error) {
	var j journal
	f, err := work.Open(journalFile)
	if errors.Is(err, os.ErrNotExist) {
		return j, nil
	}
	if err != nil {
		return j, fmt.Errorf("watch: read the journal: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxJournal+1))
	if err != nil {
		return j, fmt.Errorf("watch: read the journal: %w", err)
	}
	if len(b) > maxJournal {
		return j, fmt.Errorf("watch: the journal is larger than %d bytes", maxJournal)
	}
	if err := json.Unmarshal(b, &j); err != nil {
		return journal{}, fmt.Errorf("watch: the journal is damaged: %w", err)
	}
	for _, r := range j.Apps {
		for _, s := range []*staged{r.Serving, r.Staged} {
			if s != nil && !plainDir(s.Dir) {
				return journal{}, fmt.Errorf("watch: the journal is damaged: it names the directory %q", s.Dir)
			}
		}
	}
	for _, d := range j.Retired {
		if !plainDir(d) {
			return journal{}, fmt.Errorf("watch: the journal is damaged: it names the directory %q", d)
		}
	}
	return j, nil
}

// plainDir reports whether d names a directory beside the others.
func plainDir(d string) bool { return d != "." && filepath.IsLocal(d) && d == filepath.Base(d) }

// writeJournal replaces the journal; after a failure the old one is still there.
func writeJournal(work *os.Root, j journal) (err error) {
	b, err := json.MarshalIndent(j, "", "  ")
	if err != nil {
		return fmt.Errorf("watch: write the journal: %w", err)
	}
	const temporary = journalFile + ".new"
	defer func() {
		if err != nil {
			_ = work.Remove(temporary) // there may be none
			err = fmt.Errorf("watch: write the journal: %w", err)
		}
	}()
	f, err := work.OpenFile(temporary, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	return work.Rename(temporary, journalFile)
}

func (s *staged) bundle(host, path, apps string) core.Bundle {
	version := s.Version
	if version == "" {
		version = s.Digest[:min(12, len(s.Digest))]
	}
	return core.Bundle{Host: host, Path: path, Version: version, Digest: s.Digest, Dir: filepath.Join(apps, s.Dir)}
}
