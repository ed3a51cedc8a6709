package conformance_test

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// Every line of the table of hostile inputs names tests, and they are there.
func TestHostileTable(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, ok := strings.Cut(string(readme), "\n## Hostile inputs and faults of sessions\n")
	if !ok {
		t.Fatal("the README has no table")
	}
	table, _, _ = strings.Cut(table, "\n## ")
	named := regexp.MustCompile("`([a-z/]+)`|((?:Test|Fuzz)[A-Za-z0-9]+)")
	rows := 0
	for line := range strings.Lines(table) {
		cells := strings.Split(line, "|")
		if len(cells) != 5 || strings.HasPrefix(cells[1], " ---") || cells[1] == " Input or fault " {
			continue
		}
		rows++
		found, code := 0, ""
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
			if found++; !strings.Contains(code, "\nfunc "+m[2]+"(") {
				t.Errorf("%s:%s is not there", strings.TrimSpace(cells[1]), m[2])
			}
		}
		if found == 0 {
			t.Errorf("%s names no test", strings.TrimSpace(cells[1]))
		}
	}
	if rows < 30 {
		t.Errorf("%d rows were read", rows)
	}
}
