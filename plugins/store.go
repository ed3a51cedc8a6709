package plugins

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
)

// store keeps private copies of external programs under their digest, so that
// the file that was checked is the file that runs.
type store struct {
	dir string // empty: a temporary directory

	mu   sync.Mutex // guards temp
	temp string     // the temporary directory, once it is made
}

func validDigest(s string) bool {
	b, err := hex.DecodeString(s)
	return err == nil && len(b) == sha256.Size
}

// digest returns the SHA-256 of a file, copying it to w.
func digest(path string, w io.Writer) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(io.MultiWriter(h, w), f); err != nil {
		return "", fmt.Errorf("read %s: %w", path, err)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// verify checks a file against its pin.
func verify(path, pin string) error {
	got, err := digest(path, io.Discard)
	if err != nil {
		return fmt.Errorf("plugins: %w", err)
	}
	return compare(path, got, pin)
}

func compare(path, got, pin string) error {
	if !strings.EqualFold(got, pin) {
		return fmt.Errorf("plugins: %s is not the program that was pinned: its SHA-256 is %s, pinned is %s; if the new program is to be trusted, pin its digest", path, got, strings.ToLower(pin))
	}
	return nil
}

// executable returns the path of the checked copy of a program. It reads the
// copy at every start; if somebody has changed it, it is made anew from the
// original, which must still have the pinned digest.
func (s *store) executable(path, pin string) (string, error) {
	dir, err := s.directory()
	if err != nil {
		return "", err
	}
	target := filepath.Join(dir, strings.ToLower(pin))
	if verify(target, pin) == nil {
		return target, nil
	}
	tmp, err := os.CreateTemp(dir, "new-")
	if err != nil {
		return "", fmt.Errorf("plugins: store: %w", err)
	}
	defer os.Remove(tmp.Name())
	got, err := digest(path, tmp)
	if err == nil {
		err = compare(path, got, pin)
	}
	if err = errors.Join(err, tmp.Chmod(0o500), tmp.Close()); err != nil {
		return "", err
	}
	if err := os.Rename(tmp.Name(), target); err != nil {
		return "", fmt.Errorf("plugins: store: %w", err)
	}
	return target, nil
}

func (s *store) directory() (string, error) {
	if s.dir != "" {
		if err := os.MkdirAll(s.dir, 0o700); err != nil {
			return "", fmt.Errorf("plugins: store: %w", err)
		}
		return s.dir, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.temp == "" {
		dir, err := os.MkdirTemp("", "longhouse-store-")
		if err != nil {
			return "", fmt.Errorf("plugins: store: %w", err)
		}
		s.temp = dir
	}
	return s.temp, nil
}

// close removes the temporary directory.
func (s *store) close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	dir := s.temp
	s.temp = ""
	if dir == "" {
		return nil
	}
	return os.RemoveAll(dir)
}
