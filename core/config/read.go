package config

import (
	"fmt"
	"io"
	"os"
)

// Read reads a configuration in YAML. file is its name for errors, which are
// [Problems] with everything that is wrong. Defaults are not filled in: see
// [Config.Normalize]; what needs the whole picture is checked by
// [Config.Validate].
func Read(file string, data []byte) (*Config, error) {
	src := newSource(file, 0, data)
	root, problems := parse(src, data)
	if len(problems) > 0 {
		return nil, problems
	}
	c := new(Config)
	if err := decodeRoot(root, c); err != nil {
		return nil, err
	}
	return c, nil
}

// Load reads a YAML file; see [Read].
func Load(path string) (*Config, error) {
	data, err := ReadFile(path)
	if err != nil {
		return nil, err
	}
	return Read(path, data)
}

// ReadFile returns the content of a configuration file, if it is not bigger
// than MaxFile.
func ReadFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, MaxFile+1))
	if err != nil {
		return nil, fmt.Errorf("config: read %s: %w", path, err)
	}
	if len(data) > MaxFile {
		return nil, fmt.Errorf("config: %s is bigger than %d bytes", path, MaxFile)
	}
	return data, nil
}
