# A session without a terminal, keys, two panes.
export TERM=xterm
tmux -S /tmp/tmux.socket new-session -d -x 100 -y 30 'sh'
tmux -S /tmp/tmux.socket split-window -d 'sleep 1000'
test "$(tmux -S /tmp/tmux.socket list-panes | wc -l)" = 2
tmux -S /tmp/tmux.socket send-keys 'echo sum $((40+2))' Enter
for n in $(seq 50); do
	tmux -S /tmp/tmux.socket capture-pane -p | grep '^sum 42$' && break
	sleep 0.2
done
tmux -S /tmp/tmux.socket capture-pane -p | grep -q '^sum 42$'
tmux -S /tmp/tmux.socket kill-server
