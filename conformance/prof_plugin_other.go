//go:build !unix

package conformance

import (
	"errors"
	"os"
	"os/exec"
)

func killProcess(pid int) error {
	p, err := os.FindProcess(pid)
	if err != nil {
		return err
	}
	return p.Kill()
}

func ownGroup(*exec.Cmd) {}

func killGroup(cmd *exec.Cmd) {
	if cmd.Process != nil {
		_ = cmd.Process.Kill() // it may have ended
	}
}

func freezeProcess(int) error { return errors.ErrUnsupported }

func alive(pid int) bool {
	p, err := os.FindProcess(pid)
	if err == nil {
		_ = p.Release()
	}
	return err == nil
}

func environment(int, string) string { return "" }
func offspring(string) []string      { return nil }
