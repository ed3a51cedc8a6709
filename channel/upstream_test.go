package channel_test

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// The README's table of the tests of Tribes names tests that exist.
func TestUpstreamTable(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, ok := strings.Cut(string(readme), "## The tests of Tribes")
	if !ok {
		t.Fatal("the README has no table")
	}
	rows, named := 0, regexp.MustCompile("`([a-z/]+)`|(Test[A-Za-z0-9]+)")
	for line := range strings.Lines(table) {
		cells := strings.Split(line, "|")
		if len(cells) != 5 || strings.HasPrefix(cells[1], " ---") || cells[1] == " Tribes " {
			continue
		}
		rows++
		code, found := "", 0
		for _, m := range named.FindAllStringSubmatch(cells[3], -1) {
			if m[1] != "" {
				code = ""
				files, err := filepath.Glob(filepath.Join("..", m[1], "*_test.go"))
				if err != nil {
					t.Fatal(err)
				}
				for _, f := range files {
					b, err := os.ReadFile(f)
					if err != nil {
						t.Fatal(err)
					}
					code += string(b)
				}
				continue
			}
			found++
			if !strings.Contains(code, "\nfunc "+m[2]+"(") {
				t.Errorf("%s:%s is not there", strings.TrimSpace(cells[1]), m[2])
			}
		}
		if found == 0 {
			t.Errorf("%s names no test", strings.TrimSpace(cells[1]))
		}
	}
	if rows < 20 {
		t.Errorf("%d rows were read", rows)
	}
}
