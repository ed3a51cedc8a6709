package httpd

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// maxScanned bounds how many file handles are looked at to find a port's owner.
const maxScanned = 50_000

// owner describes the process that listens on a TCP port of this machine, as
// far as the kernel shows it to this user. It is for an error message.
func owner(port int) string {
	inodes := map[string]bool{}
	for _, table := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		f, err := os.Open(table)
		if err != nil {
			continue
		}
		lines := bufio.NewScanner(f)
		for lines.Scan() {
			// sl local rem st tx:rx tr:when retrnsmt uid timeout inode
			col := strings.Fields(lines.Text())
			if len(col) < 10 || col[3] != "0A" { // not listening
				continue
			}
			if _, hex, ok := strings.Cut(col[1], ":"); ok {
				if p, err := strconv.ParseUint(hex, 16, 16); err == nil && int(p) == port {
					inodes["socket:["+col[9]+"]"] = true
				}
			}
		}
		_ = f.Close()
	}
	if len(inodes) == 0 {
		return "another process"
	}
	handles, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, h := range handles[:min(len(handles), maxScanned)] {
		if target, err := os.Readlink(h); err == nil && inodes[target] {
			pid := strings.Split(h, "/")[2]
			if pid == strconv.Itoa(os.Getpid()) {
				return "this process itself"
			}
			name, _ := os.ReadFile("/proc/" + pid + "/comm")
			return fmt.Sprintf("process %s (%s)", pid, bytes.TrimSpace(name))
		}
	}
	return "a process of another user"
}
