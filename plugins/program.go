package plugins

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"github.com/longhouse-go/longhouse/core/config"
	"github.com/longhouse-go/longhouse/plugins/internal/bridge"
)

const (
	// describeTimeout bounds the answer to "describe", describeGrace the wait
	// for something that holds its output open.
	describeTimeout = 10 * time.Second
	describeGrace   = 500 * time.Millisecond
	// maxDescribe bounds the answer in bytes, maxComponents the components in
	// it.
	maxDescribe   = 1 << 20
	maxComponents = 32
)

// DescribeProgram runs a program with the argument "describe" and returns what
// it says of its components. The program gets nothing of this process's
// environment, a bounded time and a bounded answer, and everything it has
// started is killed at the end. Run only programs that may run: this executes
// it.
func DescribeProgram(ctx context.Context, path string) ([]Description, error) {
	dir, err := os.MkdirTemp(socketRoot(), bridge.PrivateDirPrefix)
	if err != nil {
		return nil, fmt.Errorf("plugins: describe: %w", err)
	}
	defer os.RemoveAll(dir)
	ctx, cancel := context.WithTimeout(ctx, describeTimeout)
	defer cancel()
	out, words := &limited{max: maxDescribe}, &limited{max: 4 << 10}
	path, err = filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("plugins: describe: %w", err)
	}
	cmd := exec.CommandContext(ctx, path, "describe")
	cmd.Env, cmd.Dir, cmd.Stdout, cmd.Stderr, cmd.WaitDelay = []string{"TMPDIR=" + dir}, dir, out, words, describeGrace
	separate(cmd)
	cmd.Cancel = func() error {
		killGroup(cmd.Process.Pid)
		return cmd.Process.Kill()
	}
	out.full = cancel
	err = cmd.Run()
	if cmd.Process != nil {
		killGroup(cmd.Process.Pid) // what it has left running
	}
	name := filepath.Base(path)
	switch {
	case out.over:
		return nil, fmt.Errorf("plugins: describe: %s has answered with more than %d bytes", name, maxDescribe)
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		return nil, fmt.Errorf("plugins: describe: %s has not ended within %v", name, describeTimeout)
	case err != nil && !errors.Is(err, exec.ErrWaitDelay):
		return nil, fmt.Errorf("plugins: describe: %s: %w; is it a plugin of longhouse? it said %s", name, err, quote(words.buf.String()))
	}
	list, err := parseDescriptions(out.buf.Bytes())
	if err != nil {
		return nil, fmt.Errorf("plugins: describe: %s: %w; it answered %s", name, err, quote(out.buf.String()))
	}
	return list, nil
}

// parseDescriptions reads one JSON object for each component.
func parseDescriptions(text []byte) ([]Description, error) {
	var list []Description
	dec := json.NewDecoder(bytes.NewReader(text))
	for {
		var d Description
		if err := dec.Decode(&d); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, fmt.Errorf("the answer cannot be read: %w", err)
		}
		if len(list) == maxComponents {
			return nil, fmt.Errorf("more than %d components", maxComponents)
		}
		if slices.ContainsFunc(list, func(o Description) bool { return o.Kind == d.Kind && o.Name == d.Name }) {
			return nil, fmt.Errorf("%s/%s is there twice", d.Kind, d.Name)
		}
		if err := checkDescription(d); err != nil {
			return nil, err
		}
		list = append(list, d)
	}
	if len(list) == 0 {
		return nil, errors.New("the answer is empty")
	}
	return list, nil
}

// checkDescription finds what makes a description useless.
func checkDescription(d Description) error {
	switch {
	case !slices.Contains(lockedKinds, d.Kind):
		return fmt.Errorf("%s is no kind of plugin (known: %v)", quote(d.Kind), lockedKinds)
	case !pluginName.MatchString(d.Name) || len(d.Name) > maxText:
		return fmt.Errorf("%s is no name of a plugin: vendor/name in lower case is wanted", quote(d.Name))
	case len(d.API) == 0:
		return fmt.Errorf("%s/%s names no version of the plugin protocol", d.Kind, d.Name)
	case !slices.Contains(d.API, bridge.APIVersion):
		return fmt.Errorf("%s/%s speaks versions %v of the plugin protocol, this program %d: rebuild it with a current SDK, or use the longhouse it was made for", d.Kind, d.Name, d.API, bridge.APIVersion)
	}
	if err := d.Check(); err != nil {
		return fmt.Errorf("%s/%s: %w", d.Kind, d.Name, err)
	}
	if len(d.ConfigSchema) > 0 {
		if err := config.CheckSchema(d.ConfigSchema); err != nil {
			return fmt.Errorf("%s/%s: %w", d.Kind, d.Name, err)
		}
	}
	return nil
}

// limited keeps the first bytes of an output.
type limited struct {
	buf  bytes.Buffer // not embedded: its ReadFrom has no bound
	max  int
	over bool
	full func() // called once there is more
}

// Write never fails, so that the program is not killed by a broken pipe.
func (l *limited) Write(p []byte) (int, error) {
	n := min(len(p), l.max-l.buf.Len())
	l.buf.Write(p[:n])
	if n < len(p) {
		l.over = true
		if l.full != nil {
			l.full()
		}
	}
	return len(p), nil
}
