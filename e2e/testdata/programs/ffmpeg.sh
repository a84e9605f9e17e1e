# A film with sound is made, read, and taken apart again.
mkdir -p /tmp/ffmpeg && cd /tmp/ffmpeg
ffmpeg -v error -y -f lavfi -i testsrc=duration=2:size=320x240:rate=25 -f lavfi -i sine=duration=2 -c:v libx264 -c:a aac film.mp4
test "$(ffprobe -v error -count_frames -select_streams v -show_entries stream=nb_read_frames -of csv=p=0 film.mp4)" = 50
ffmpeg -v error -y -i film.mp4 -vf scale=160:-1 -r 5 frame-%02d.png
test "$(ls frame-*.png | wc -l)" -ge 10
