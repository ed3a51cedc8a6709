package conformance

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"reflect"
	"testing"
	"time"
)

// harness runs f as a test on a tree of its own: its failure fails nobody else.
// It returns what package testing printed. It works under go test and in an
// ordinary program.
func harness(name string, f func(*testing.T)) (output string, err error) {
	read, write, err := os.Pipe()
	if err != nil {
		return "", fmt.Errorf("conformance: %w", err)
	}
	printed := make(chan string)
	go func() {
		var b bytes.Buffer
		_, _ = io.Copy(&b, io.LimitReader(read, maxOutput))
		_, _ = io.Copy(io.Discard, read)
		printed <- b.String()
	}()
	stdout := os.Stdout
	os.Stdout = write
	defer func() {
		os.Stdout = stdout
		write.Close()
		output = <-printed
		read.Close()
	}()
	ran := false
	tests := []testing.InternalTest{{Name: name, F: func(t *testing.T) { ran = true; f(t) }}}
	all := func(string, string) (bool, error) { return true, nil }
	if testing.Testing() {
		testing.RunTests(all, tests)
	} else {
		m := testing.MainStart(deps{}, tests, nil, nil, nil)
		// The program's own arguments are not those of package testing.
		if err := flag.CommandLine.Parse([]string{"-test.timeout=0"}); err != nil {
			return "", fmt.Errorf("conformance: %w", err)
		}
		m.Run()
	}
	if !ran {
		return "", errors.New("conformance: package testing did not run the suite (was -failfast given?)")
	}
	return "", nil
}

// maxOutput bounds what is kept of a run's output, in bytes.
const maxOutput = 4 << 20

// deps is what package testing asks of go test, for a program that is none:
// everything is run, nothing is profiled or fuzzed.
type deps struct{}

type corpusEntry = struct {
	Parent     string
	Path       string
	Data       []byte
	Values     []any
	Generation int
	IsSeed     bool
}

var errNoFuzzing = errors.New("conformance: not a fuzz test")

func (deps) ImportPath() string                          { return "" }
func (deps) ModulePath() string                          { return "" }
func (deps) MatchString(string, string) (bool, error)    { return true, nil }
func (deps) SetPanicOnExit0(bool)                        {}
func (deps) StartCPUProfile(io.Writer) error             { return nil }
func (deps) StopCPUProfile()                             {}
func (deps) StartTestLog(io.Writer)                      {}
func (deps) StopTestLog() error                          { return nil }
func (deps) WriteProfileTo(string, io.Writer, int) error { return nil }
func (deps) RunFuzzWorker(func(corpusEntry) error) error { return errNoFuzzing }
func (deps) CheckCorpus([]any, []reflect.Type) error     { return nil }
func (deps) ResetCoverage()                              {}
func (deps) SnapshotCoverage()                           {}

func (deps) CoordinateFuzzing(time.Duration, int64, time.Duration, int64, int, []corpusEntry, []reflect.Type, string, string) error {
	return errNoFuzzing
}

func (deps) ReadCorpus(string, []reflect.Type) ([]corpusEntry, error) { return nil, nil }

func (deps) InitRuntimeCoverage() (mode string, tearDown func(string, string) (string, error), snapcov func() float64) {
	return "", nil, func() float64 { return 0 }
}
